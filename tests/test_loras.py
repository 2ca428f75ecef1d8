"""LoRAs: found, checked against the model before anything is loaded, and switched without loading it again."""

import json
import math
import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.catalog import loras
from engine.catalog.loras import BadLora
from engine.catalog.models import PACKAGE, Catalog
from engine.catalog.weights import read_tensors
from engine.gpu.run.adapters import strength
from engine.job import Lora
from tests.daemon import Daemon
from tests.frames import read_video
from tests.idle import idle_daemon

DEMO = Catalog.load().get("wan_demo")
WEIGHTS = PACKAGE / "demo"
RANK, WIDTH, BLOCKS = 4, 128, 4
QUICK = {"num_inference_steps": 4, "video_length": 9, "seed": 7}


def layers(seed: int, *, width: int = WIDTH, blocks: int = BLOCKS, gain: float = 0.3) -> dict[str, torch.Tensor]:
    """LoRA weights for all self-attention values of the embedded model."""
    rng = torch.Generator().manual_seed(seed)
    names = [f"transformer.blocks.{block}.attn1.to_v" for block in range(blocks)]
    down = {f"{name}.lora_A.weight": torch.randn(RANK, width, generator=rng) * gain for name in names}
    up = {f"{name}.lora_B.weight": torch.randn(width, RANK, generator=rng) * gain for name in names}
    return down | up


LAYERS = layers(1)


def written(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    path = folder / "wan" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def chosen(folder: Path, *names: str, multipliers: str = "") -> tuple[Lora, ...]:
    return loras.chosen(list(names), multipliers, DEMO, folder, WEIGHTS)


# ------------------------------------------------------------------------------------------------------- the files


def test_the_files_of_the_models_family_are_listed(tmp_path: Path) -> None:
    written(tmp_path, "b", layers(1))
    written(tmp_path, "a", layers(2))
    (tmp_path / "wan" / "notes.txt").write_text("none")
    assert loras.available(DEMO, tmp_path) == ["a.safetensors", "b.safetensors"]


def test_a_name_is_taken_with_and_without_its_suffix(tmp_path: Path) -> None:
    path = written(tmp_path, "a", layers(1))
    assert chosen(tmp_path, "a") == chosen(tmp_path, "a.safetensors") == (Lora(path, ((1.0,),)),)


@pytest.mark.parametrize("name", ["b", "../a", "/etc/passwd", "a/../a", "", "."])
def test_a_file_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, name: str) -> None:
    written(tmp_path, "a", layers(1))
    sentence = f"activated_loras: '{name}' is not in the LoRA folder of family 'wan'; there are: a.safetensors"
    with pytest.raises(BadLora, match=f"^{re.escape(sentence)}$"):
        chosen(tmp_path, name)


UNFIT = {
    "too wide": (layers(1, width=192), "its layer transformer.blocks.0.attn1.to_v is 192x192"),
    "too deep": (layers(1, blocks=BLOCKS + 1), f"it has blocks {BLOCKS}, and the model's last is {BLOCKS - 1}"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_lora_of_another_model_is_refused_naming_what_does_not_fit(tmp_path: Path, case: str) -> None:
    tensors, reason = UNFIT[case]
    written(tmp_path, "alien", tensors)
    sentence = f"activated_loras: 'alien.safetensors' does not fit model 'wan_demo': {reason}"
    with pytest.raises(BadLora, match=re.escape(sentence)):
        chosen(tmp_path, "alien")


def test_names_of_the_original_code_and_of_other_trainers_fit_too(tmp_path: Path) -> None:
    for style in ("diffusion_model.blocks.{}.self_attn.v", "lora_unet_blocks_{}_self_attn_v"):
        down = {f"{style.format(i)}.lora_down.weight": torch.zeros(RANK, WIDTH) for i in range(BLOCKS)}
        up = {f"{style.format(i)}.lora_up.weight": torch.zeros(WIDTH, RANK) for i in range(BLOCKS)}
        written(tmp_path, "styled", down | up)
        assert len(chosen(tmp_path, "styled")) == 1


BROKEN = {
    "empty": (b"", "is no safetensors file"),
    "cut off": (b"\xff\x00\x00\x00\x00\x00\x00\x00{", "is no safetensors file"),
    "too large a header": (b"\xff" * 8, "is no safetensors file"),
    "text": (b"<html>not found</html>", "is no safetensors file"),
}


def header(raw: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(raw) if size is None else size) + raw


BROKEN |= {
    name: (header(raw), "is no safetensors file")
    for name, raw in {
        "deep list": b"[" * 200_000,
        "deep object": b'{"a":' * 100_000,
        "no UTF-8": b'{"\xff":1}',
        "a list": b"[]",
        "null": b"null",
        "a huge number": b'{"a.lora_A.weight":{"shape":[' + b"9" * 5000 + b"]}}",
        "a number beyond 64 bits": b'{"a.lora_A.weight":{"shape":[1,99999999999999999999]}}',
        "very many dimensions": b'{"a.lora_A.weight":{"shape":[' + b"9," * 100_000 + b"9]}}",
        "no shape": b'{"a.lora_A.weight":{},"a.lora_B.weight":{}}',
        "a shape of text": b'{"a.lora_A.weight":{"shape":"12"}}',
        "a shape of booleans": b'{"a.lora_A.weight":{"shape":[true]}}',
        "a tensor that is none": b'{"a.lora_A.weight":7}',
        "zeros": bytes(64),
        "100 MB": b" " * 100_000_000,
    }.items()
}
BROKEN["a header beyond the file"] = header(b"{}", 2**20), "is no safetensors file"
BROKEN["no numbers at all"] = (
    header(b'{"a.lora_A.weight":{"shape":[]},"a.lora_B.weight":{"shape":[]}}'),
    "no counterpart",
)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, case: str) -> None:
    data, reason = BROKEN[case]
    written(tmp_path, "a", layers(1)).write_bytes(data)
    with pytest.raises(BadLora, match=reason):
        chosen(tmp_path, "a")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["shape", "x"]), inner, max_size=3),
    max_leaves=8,
)
NUMBER = "9" * 30
NAMES = st.sampled_from(
    [*layers(1), "a.lora_down.weight", "a.lora_up.weight", "__metadata__"]
    + [f"blocks.{NUMBER}.x.lora_{side}.weight" for side in "AB"]
)
ENTRIES = JSON | st.fixed_dictionaries({"shape": st.lists(st.integers(-3, 2**66) | JSON, max_size=4)})


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    content=st.dictionaries(NAMES | st.text(max_size=6), ENTRIES, max_size=6) | JSON,
    off=st.sampled_from([0, -1, 5, 2**63]),
)
def test_no_header_raises_anything_but_bad_lora(tmp_path: Path, content: Any, off: int) -> None:
    raw = json.dumps(content).encode()
    written(tmp_path, "a", layers(1)).write_bytes(header(raw, min(max(0, len(raw) + off), 2**64 - 1)))
    with suppress(BadLora):
        chosen(tmp_path, "a")


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300), size=st.integers(0, 400))
def test_no_bytes_raise_anything_but_bad_lora(tmp_path: Path, data: bytes, size: int) -> None:
    written(tmp_path, "a", layers(1)).write_bytes(header(data, size))
    with pytest.raises(BadLora):
        chosen(tmp_path, "a")


@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a device"])
def test_a_name_without_a_file_is_refused_and_nothing_waits_for_it(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, "a", layers(1))
    path.unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(BadLora, match=r"there is none$"):
        chosen(tmp_path, "a")
    with pytest.raises(OSError):  # and if it took the place of a file just now
        read_tensors(path)


def test_very_long_names_are_read_in_linear_time(tmp_path: Path) -> None:
    """A search that began again at each character of such a name would take hours."""
    names = [f"{'_' * 700_000}{number}.lora_A.weight" for number in range(5)]
    raw = json.dumps({name: {"shape": [4, 4]} for name in names}).encode()
    written(tmp_path, "a", layers(1)).write_bytes(header(raw))
    with pytest.raises(BadLora, match="no counterpart"):
        chosen(tmp_path, "a")


def test_a_checkpoint_is_no_lora(tmp_path: Path) -> None:
    written(tmp_path, "whole", {"blocks.0.attn1.to_v.weight": torch.zeros(WIDTH, WIDTH)})
    with pytest.raises(BadLora, match=r"holds no LoRA layers$"):
        chosen(tmp_path, "whole")


def test_half_a_lora_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "half", {name: tensor for name, tensor in layers(1).items() if "lora_A" in name})
    with pytest.raises(BadLora, match=r"has no counterpart$"):
        chosen(tmp_path, "half")


# ---------------------------------------------------------------------------------------------------- multipliers


@pytest.mark.parametrize(
    ("text", "phases"),
    [
        ("", [((1.0,),), ((1.0,),)]),
        ("0.5", [((0.5,),), ((1.0,),)]),
        ("0.5 0.25", [((0.5,),), ((0.25,),)]),
        ("# strong\n0.5\n# weak\n-0.25\n", [((0.5,),), ((-0.25,),)]),
        ("0,0.5,1 1;0", [((0.0, 0.5, 1.0),), ((1.0,), (0.0,))]),
    ],
)
def test_multipliers_are_read_as_wangp_reads_them(tmp_path: Path, text: str, phases: list[Any]) -> None:
    for name in "ab":
        written(tmp_path, name, layers(1))
    assert [lora.phases for lora in chosen(tmp_path, "a", "b", multipliers=text)] == phases


@pytest.mark.parametrize(
    "text", ["1 2 3", "strong", "1;;2", "1,", "1 nan? 2", "nan", "inf", "1,-inf", "1e999", "0;nan"]
)
def test_wrong_multipliers_are_refused(tmp_path: Path, text: str) -> None:
    for name in "ab":
        written(tmp_path, name, layers(1))
    with pytest.raises(BadLora, match=r"^loras_multipliers: "):
        chosen(tmp_path, "a", "b", multipliers=text)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(text=st.text(alphabet="0123456789.,;+-e_naif# \n\u0661\u2028", max_size=40))
def test_no_multipliers_raise_anything_but_bad_lora(tmp_path: Path, text: str) -> None:
    for name in "abc":
        written(tmp_path, name, LAYERS)
    with suppress(BadLora):
        strengths = [
            value for lora in chosen(tmp_path, *"abc", multipliers=text) for phase in lora.phases for value in phase
        ]
        assert all(map(math.isfinite, strengths))


@pytest.mark.parametrize("line", ["\n" * 100_000, " " * 100_000 + "x", "#" * 100_000])
def test_long_multipliers_are_read_in_linear_time(tmp_path: Path, line: str) -> None:
    written(tmp_path, "a", layers(1))
    with suppress(BadLora):
        chosen(tmp_path, "a", multipliers=line)


def test_several_values_are_spread_evenly_over_the_steps() -> None:
    lora = Lora(Path("a"), ((0.0, 0.5, 1.0),))
    assert [strength(lora, step, 6)["transformer"] for step in range(6)] == [0, 0, 0.5, 0.5, 1, 1]


def test_the_phases_are_those_of_the_two_experts() -> None:
    assert strength(Lora(Path("a"), ((1.0,), (0.25,))), 0, 4) == {"transformer": 1.0, "transformer_2": 0.25}


# -------------------------------------------------------------------------------------------------- through HTTP


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("loras")
    for name, seed in (("one", 1), ("two", 2)):
        written(folder / "loras", name, layers(seed))
    written(folder / "loras", "alien", layers(1, width=192))
    with Daemon(folder, log_level="debug") as daemon:
        yield daemon


def frames(session: Daemon, **fields: Any) -> np.ndarray[Any, Any]:
    return read_video(session.made(session.run(**QUICK, **fields)))


def test_the_loras_for_a_model_are_listed(session: Daemon) -> None:
    data = session.get("/loras?model=wan_demo").json()["data"]
    names = ["alien.safetensors", "one.safetensors", "two.safetensors"]
    assert data == {"model": "wan_demo", "family": "wan", "loras": names}


def test_loras_of_an_unknown_model_are_404(session: Daemon) -> None:
    assert session.get("/loras?model=wan_9").status_code == 404


def test_a_lora_that_does_not_fit_is_400_and_nothing_is_queued(session: Daemon) -> None:
    answer = session.post("/generate", {"prompt": "a", "activated_loras": ["alien"]})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("activated_loras: 'alien.safetensors' does not fit model 'wan_demo'")
    assert session.get("/queue").json()["data"]["total_tasks"] == 0


def test_before_the_weights_are_here_nothing_tells_whether_a_lora_fits(tmp_path: Path) -> None:
    with idle_daemon(tmp_path, allow_download=True) as daemon:
        request = {"prompt": "a", "model_type": "wan_t2v_1.3B", "activated_loras": ["one"]}
        answer = daemon.post("/generate", request)
    sentence = (
        "activated_loras: 'wan_t2v_1.3B' is not installed, so it can't be checked whether they fit; install it with: "
    )
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(sentence)


def test_loras_are_switched_on_and_off_without_loading_the_model_again(session: Daemon) -> None:
    plain = frames(session)
    loaded = session.log.read_text().count("loaded model")
    one, two = (frames(session, activated_loras=[name]) for name in ("one", "two"))
    assert not np.array_equal(plain, one)
    assert not np.array_equal(one, two)
    assert np.array_equal(frames(session, activated_loras=["one"]), one)
    assert np.array_equal(frames(session), plain)
    assert session.log.read_text().count("loaded model") == loaded


def test_a_multiplier_of_nothing_is_no_lora(session: Daemon) -> None:
    assert np.array_equal(frames(session, activated_loras=["one"], loras_multipliers="0"), frames(session))


def test_strengths_that_change_over_the_steps_are_neither_the_first_nor_the_last(session: Daemon) -> None:
    spread, first, last = (frames(session, activated_loras=["one"], loras_multipliers=m) for m in ("0,1", "0", "1"))
    assert not np.array_equal(spread, first)
    assert not np.array_equal(spread, last)


def test_the_settings_of_a_status_ask_for_the_same_loras(session: Daemon) -> None:
    first = session.run(**QUICK, activated_loras=["one", "two"], loras_multipliers="0.5 0,1;0.25")
    assert first["settings"]["activated_loras"] == ["one.safetensors", "two.safetensors"]
    assert first["settings"]["loras_multipliers"] == "0.5 0,1;0.25"
    again = session.finish(session.post("/generate", first["settings"]).json()["data"]["task_id"])
    assert np.array_equal(read_video(session.made(first)), read_video(session.made(again)))
