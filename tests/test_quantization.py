"""Quantised weights: nearly the same frames, written once and read back, and refused where they can't work."""

import dataclasses
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchao
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import wangpd
from engine import capabilities
from engine.capabilities import KINDS
from engine.catalog.models import PACKAGE, Catalog
from engine.catalog.weights import Weights
from engine.gpu.load import offloading, prepared, quantization
from engine.gpu.load.quantization import ModelSource
from engine.gpu.run import adapters
from engine.gpu.session import ModelSession
from engine.job import EngineConfig, EngineError
from engine.planning import placement as plans
from engine.planning.work import Parts, Work
from tests.daemon import ROOT, Daemon
from tests.frames import read_video
from tests.idle import idle_daemon
from tests.test_loras import layers as lora_layers
from tests.test_loras import written as write_lora
from tests.test_memory import PLACEMENTS, planned
from tests.test_plan import card
from tests.test_single_file import original_denoiser

CPU = torch.device("cpu")
DEMO = Catalog.load().get("wan_demo")
WEIGHTS = Weights(PACKAGE / "demo")
REQUEST = {"prompt": "a red circle moving right", "video_length": 9, "num_inference_steps": 8, "seed": 1}
LEAST_PSNR = 34.0  # of int8 against float32 in dB, both as compressed videos; docs/gpu-memory.md says so
TOLERATED = {"int8": 0.02, "nf4": 0.15}  # change of a layer's weight, as a share of its size


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------ at the start


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4", "auto"])
def test_a_kind_whose_package_is_missing_stops_the_start_with_the_command(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, KINDS[kind].package, None)  # as Python marks what is not there
    assert start(tmp_path, f'transformer_quantization = "{kind}"') == 2
    sentence = f"transformer_quantization: '{kind}' needs a package that is not here; install it: pip install"
    assert f"{sentence} '{KINDS[kind].install}'" in capsys.readouterr().err


@pytest.mark.parametrize("devices", ['device = "cpu"', 'devices = ["cuda:0", "cpu"]'])
def test_a_kind_that_no_cpu_computes_stops_the_start(
    devices: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, f'transformer_quantization = "fp8"\n{devices}') == 2
    sentence = "transformer_quantization: 'fp8' does not work on device 'cpu'; set it to \"int8\""
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_kind_starts(kind: str, tmp_path: Path) -> None:
    assert start(tmp_path, f'transformer_quantization = "{kind}"') == 0


def start(folder: Path, lines: str) -> int:
    (folder / "wangpd.toml").write_text(lines)
    return wangpd.main(["--config", str(folder / "wangpd.toml"), "--check-config"])


@pytest.mark.parametrize(("capability", "works"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_needs_a_card_that_computes_in_it(capability: tuple[int, int], works: bool) -> None:
    sentence = "transformer_quantization: 'fp8' needs compute capability 8.9, this card has 8.6; set it to \"int8\""
    assert capabilities.quantization_fault("fp8", "cuda", capability) == ("" if works else sentence)


def test_a_worker_that_finds_itself_on_a_cpu_refuses_what_that_can_not_do(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^transformer_quantization: 'fp8' does not work on device 'cpu'"):
        load("fp8", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_sees_only_the_package_that_it_needs(kind: str) -> None:
    code = (
        "import sys; from importlib.util import find_spec; from engine.capabilities import hide_unused_packages;"
        "hide_unused_packages(sys.argv[1]); print(*(name for name in ('torchao', 'bitsandbytes') if find_spec(name)))"
    )
    fresh = subprocess.run([sys.executable, "-c", code, kind], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(map(find_spec, ("torchao", "bitsandbytes")))  # both are here, so that this can fail
    assert fresh.stdout.split() == [name for name in (KINDS[kind].package,) if name not in ("", "gguf")]


def test_with_gguf_a_model_without_such_a_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with idle_daemon(tmp_path, transformer_quantization="gguf") as daemon:
        answer = daemon.post("/generate", {**REQUEST, "model_type": "wan_demo"})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("transformer_quantization: 'gguf' is configured, and model 'wan_demo'")
    assert 'base = "wan_demo" and single_file = "NAME.gguf"' in answer.json()["detail"]


@pytest.mark.parametrize("file", ["own.gguf", {"transformer": "high.gguf"}])
@pytest.mark.parametrize("configured", ["none", "int8", "gguf", "auto"])
def test_weights_from_a_gguf_file_are_used_as_they_are(file: Any, configured: str) -> None:
    model = dataclasses.replace(DEMO, single_file=file)
    assert quantization.kind_for(model, configured, pytest.fail) == "gguf"


def test_auto_is_what_the_plan_says_and_nothing_else_asks_it() -> None:
    assert quantization.kind_for(DEMO, "auto", lambda: "int8") == "int8"
    assert quantization.kind_for(DEMO, "nf4", pytest.fail) == "nf4"
    with pytest.raises(EngineError, match="'gguf' is configured"):
        quantization.kind_for(DEMO, "gguf", pytest.fail)


@pytest.mark.parametrize(("free_gib", "kind"), [(23, "int8"), (200, "none")])
def test_auto_goes_by_the_card_that_is_there(
    free_gib: float, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of 64 GB would be streamed to the smaller one."""
    config = EngineConfig(tmp_path, tmp_path, tmp_path, device="cpu", transformer_quantization="auto")
    model = Catalog.load().get("flux2_dev")
    monkeypatch.setattr(offloading, "measure", lambda _: card(free_gib))
    assert ModelSession(config, print, print)._kind_of_weights(model, Work.usual(model)) == kind


# -------------------------------------------------------------------------------------------------------- the frames


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with int8, whose user has a LoRA."""
    folder = tmp_path_factory.mktemp("int8")
    write_lora(folder / "loras", "strong", lora_layers(1))
    with Daemon(folder, transformer_quantization="int8") as running:
        yield running


def made(daemon: Daemon, **fields: Any) -> np.ndarray:
    return read_video(daemon.made(daemon.finish(daemon.submit(**REQUEST, **fields)["task_id"], 250)))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """In dB."""
    return 10 * math.log10(255**2 / ((one.astype(float) - other) ** 2).mean())


@pytest.fixture(scope="module")
def in_int8(quantised: Daemon) -> np.ndarray:
    return made(quantised)


def test_int8_makes_nearly_the_same_frames(daemon: Daemon, in_int8: np.ndarray) -> None:
    likeness = psnr(made(daemon), in_int8)
    print(f"int8 against float32: {likeness:.1f} dB")
    assert LEAST_PSNR < likeness < math.inf


def test_the_daemon_keeps_what_it_quantised_beside_the_models(quantised: Daemon, in_int8: np.ndarray) -> None:
    assert len(in_int8) == REQUEST["video_length"]
    assert [path.name.rpartition(".")[0] for path in store(quantised.models)] == ["wan_demo.int8.float32"]


@pytest.mark.parametrize("fields", [{"activated_loras": ["strong"]}, {"skip_steps_cache_type": "mag"}], ids=str)
def test_loras_and_caches_work_on_int8(quantised: Daemon, in_int8: np.ndarray, fields: dict[str, Any]) -> None:
    assert not np.array_equal(made(quantised, **fields), in_int8)
    assert np.array_equal(made(quantised), in_int8)  # and afterwards all is as before


# ----------------------------------------------------------------------------------------------- what is quantised


def load(kind: str, models_dir: Path, weights: Weights = WEIGHTS, model: Any = DEMO) -> Any:
    return quantization.load(ModelSource(model, "t2v", weights, kind), CPU, models_dir)[0]


def frames(pipe: Any) -> torch.Tensor:
    """As latents: the VAE is not what is looked at here."""
    return pipe(  # type: ignore[no-any-return]
        prompt="a red circle moving right", num_frames=5, height=32, width=32, num_inference_steps=2,
        generator=torch.Generator().manual_seed(1), output_type="latent", max_sequence_length=64,
    ).frames  # fmt: skip


def store(models_dir: Path) -> list[Path]:
    """The folders of quantised weights."""
    return sorted(path for path in (models_dir / prepared.STORE).iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    return load_file(PACKAGE / "demo" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("kind", TOLERATED)
def test_only_the_blocks_layers_are_quantised_and_each_keeps_its_values(
    kind: str, tmp_path: Path, source: dict[str, torch.Tensor]
) -> None:
    denoiser = load(kind, tmp_path).transformer
    wide = {name: weight for name, weight in denoiser.named_parameters() if type(weight) is nn.Parameter}
    assert {name for name in source if name not in wide} == {f"{name}.weight" for name in linear_layers(denoiser)}
    assert all(torch.equal(weight, source[name].float()) for name, weight in wide.items())
    for name, layer in linear_layers(denoiser).items():
        before, after = source[f"{name}.weight"].float(), dequantised(layer.weight)
        assert 0 < (after - before).abs().mean() < TOLERATED[kind] * before.abs().mean()


def linear_layers(denoiser: Any) -> dict[str, nn.Linear]:
    parts = denoiser.blocks.named_modules(prefix="blocks")
    return {name: part for name, part in parts if isinstance(part, nn.Linear)}


def dequantised(weight: Any) -> torch.Tensor:
    return weight.dequantize() if hasattr(weight, "qdata") else weight  # type: ignore[no-any-return]


def test_an_embedding_is_no_block_although_it_stands_in_a_list() -> None:
    denoiser = nn.Module()
    denoiser.dtype = torch.float32
    denoiser.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()])  # the second for its own reasons
    denoiser.x_embedder = nn.ModuleList([nn.Linear(2, 2)])
    denoiser.proj_out = nn.Linear(2, 2)
    assert list(quantization.layers(denoiser)) == ["blocks.0"]


@pytest.mark.parametrize(("kind", "dtype", "size"), [("int8", "torch.int8", 1.0), ("nf4", "torch.uint8", 0.5)])
def test_the_written_weights_are_as_small_as_they_should_be(
    kind: str, dtype: str, size: float, tmp_path: Path, source: dict[str, torch.Tensor]
) -> None:
    denoiser = load(kind, tmp_path).transformer
    numbers = sum(layer.in_features * layer.out_features for layer in linear_layers(denoiser).values())
    (path,) = tmp_path.rglob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  # no mapping
    small = sum(tensor.numel() for tensor in tensors if str(tensor.dtype) == dtype)
    assert small == pytest.approx(size * numbers, rel=0.01)
    assert path.stat().st_size < 0.5 * sum(4 * tensor.numel() for tensor in source.values())


@pytest.mark.parametrize("kind", TOLERATED)
def test_the_parts_weigh_what_they_take(kind: str, tmp_path: Path) -> None:
    _, parts = quantization.load(ModelSource(DEMO, "t2v", WEIGHTS, kind), CPU, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    assert parts.denoisers == pytest.approx(path.stat().st_size, rel=0.05)
    assert (parts.quantization, parts.parameters) == (kind, DEMO.transformer_bf16_bytes // 2)


@pytest.mark.parametrize("kind", ["none", *TOLERATED])
def test_the_plan_counts_weights_as_they_lie(kind: str) -> None:
    """Whether it is told the catalogue's or those that are quantised already, it is the same plan."""
    model = Catalog.load().get("wan_t2v_14B")
    parts = Parts.of(model)
    small = dataclasses.replace(parts, denoisers=round(parts.denoisers * plans.QUANTIZED[kind]), quantization=kind)
    made_of = [
        plans.plan(model, Work.usual(model), card(24), quantization=kind, parts=given) for given in (parts, small)
    ]
    assert made_of[0].resident_bytes + made_of[0].streamed_bytes == pytest.approx(small.denoisers, rel=0.001)
    assert made_of[1].placement == made_of[0].placement
    assert made_of[1].peak_vram_bytes == pytest.approx(made_of[0].peak_vram_bytes, rel=0.001)


@pytest.mark.parametrize("shape", [(7, 9), (64, 1), (128, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_in_four_bits_has_the_shape_and_dtype_that_it_had(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = nn.Linear(*shape, dtype=dtype).requires_grad_(False)
    small, data = quantization.FourBit.of(layer), torch.randn(2, shape[0], dtype=dtype)
    assert (small.weight.shape, small.weight.dtype) == (layer.weight.shape, dtype)
    assert torch.equal(small(data), nn.functional.linear(data, small.weight, layer.bias))
    assert offloading.size_bytes(small) < offloading.size_bytes(layer)


@pytest.mark.parametrize("placement", ["streamed from pinned memory", "swapped", "sequential"])
@pytest.mark.parametrize("kind", TOLERATED)
def test_wherever_the_quantised_weights_lie_the_frames_are_the_same(
    kind: str, placement: str, stored: dict[str, tuple[Path, torch.Tensor]]
) -> None:
    models_dir, expected = stored[kind]
    pipe = load(kind, models_dir)
    total = offloading.size_bytes(pipe.transformer)
    offloading.carry_out(pipe, planned(PLACEMENTS[placement], total // 2, total // 2), CPU)
    assert torch.equal(frames(pipe), expected)
    assert torch.equal(frames(pipe), expected)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Kind → a folder where its weights are kept, and frames made when they were."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in TOLERATED}
    return {kind: (folder, frames(load(kind, folder))) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", TOLERATED)
def test_a_lora_works_on_weights_of_every_kind(
    kind: str, stored: dict[str, tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    models_dir, expected = stored[kind]
    pipe = load(kind, models_dir)
    adapters.load_file(pipe, write_lora(tmp_path, "strong", lora_layers(1)), "strong", "transformer")
    assert not torch.allclose(frames(pipe), expected, atol=0.05)
    pipe.disable_lora()
    assert torch.equal(frames(pipe), expected)


def test_fp8_rounds_weights_and_inputs_and_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no fast products of such numbers, so it is never chosen there; but torch has slow ones."""
    monkeypatch.setattr(torchao.quantization.quant_api, "_check_hardware_support", lambda _: None)
    torch.manual_seed(0)
    denoiser = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16, text_dim=32, freq_dim=32,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    denoiser.save_pretrained(tmp_path / "source")
    denoiser = WanTransformer3DModel.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    before = forward(denoiser)
    quantization.quantize(denoiser, "fp8", CPU)
    assert denoiser.blocks[0].attn1.to_q.weight.qdata.dtype == torch.float8_e4m3fn
    after = forward(denoiser)
    assert 0 < (after - before).abs().mean() < 0.1 * before.abs().mean()
    quantization._write({"transformer": denoiser}, tmp_path / "fp8")
    again = quantization._read(tmp_path / "fp8", "fp8", lambda _: torch.bfloat16)["transformer"]
    assert torch.equal(forward(again), after)
    assert {name: t.dtype for name, t in again.state_dict().items()} == {
        name: t.dtype for name, t in denoiser.state_dict().items()
    }


@torch.no_grad()
def forward(denoiser: Any) -> torch.Tensor:
    torch.manual_seed(1)
    hidden, prompt = torch.randn(1, 16, 3, 8, 8).bfloat16(), torch.randn(1, 5, 32).bfloat16()
    out = denoiser(hidden_states=hidden, timestep=torch.tensor([500]), encoder_hidden_states=prompt, return_dict=False)
    return out[0].float()  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------- what is kept


@pytest.fixture
def installed(tmp_path: Path) -> Weights:
    """The embedded model's weights in a folder of the user's."""
    return Weights(Path(shutil.copytree(PACKAGE / "demo", tmp_path / "models" / "demo")))


def spoil(path: Path) -> None:
    """Make all weights of a file zero, which neither its header nor its size and time show."""
    about, data = path.stat(), path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:header] + bytes(len(data) - header))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def denoiser_file(weights: Weights) -> Path:
    return weights.folder / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", TOLERATED)
def test_a_second_load_reads_what_was_written_and_not_the_source(kind: str, installed: Weights, tmp_path: Path) -> None:
    first = frames(load(kind, tmp_path, installed))
    spoil(denoiser_file(installed))
    assert torch.equal(frames(load(kind, tmp_path, installed)), first)


def test_a_second_load_does_not_read_the_single_file_that_it_came_from(tmp_path: Path) -> None:
    save_file(original_denoiser(), tmp_path / "own.safetensors")
    weights = Weights(PACKAGE / "demo", files={"": tmp_path / "own.safetensors"})
    first = frames(load("int8", tmp_path, weights))
    spoil(tmp_path / "own.safetensors")
    assert torch.equal(frames(load("int8", tmp_path, weights)), first)


def test_weights_that_changed_are_quantised_again_in_place_of_the_old(
    installed: Weights, tmp_path: Path, source: dict[str, torch.Tensor]
) -> None:
    first, before = frames(load("int8", tmp_path, installed)), store(tmp_path)
    save_file({**source, "proj_out.weight": -source["proj_out.weight"]}, denoiser_file(installed))
    assert not torch.equal(frames(load("int8", tmp_path, installed)), first)
    assert len(store(tmp_path)) == 1
    assert store(tmp_path) != before


def test_each_kind_and_model_has_a_folder_of_its_own(tmp_path: Path) -> None:
    for kind in TOLERATED:
        load(kind, tmp_path)
    load("int8", tmp_path, model=dataclasses.replace(DEMO, id="other"))
    assert len(store(tmp_path)) == 3


def test_a_half_written_folder_is_not_read_and_goes(tmp_path: Path) -> None:
    load("int8", tmp_path)
    (whole,) = store(tmp_path)
    (left := whole.with_name(f"{whole.name}.part")).mkdir()
    shutil.move(whole / "transformer" / "config.json", left / "config.json")
    shutil.rmtree(whole)
    assert load("int8", tmp_path)
    assert store(tmp_path) == [whole]


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_broken_file_is_made_again(name: str, tmp_path: Path) -> None:
    first = frames(load("int8", tmp_path))
    (whole,) = store(tmp_path)
    broken = whole / "transformer" / name
    broken.write_bytes(broken.read_bytes()[:100])
    assert torch.equal(frames(load("int8", tmp_path)), first)
    assert broken.stat().st_size > 100


def test_without_room_on_the_disk_it_runs_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert load("int8", tmp_path)
    assert store(tmp_path) == []
    assert "are not kept: it takes 0.0 GiB, and 0.0 GiB are free" in caplog.text


def test_where_nothing_can_be_written_it_runs_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / prepared.STORE).write_text("a file where the folder should be")
    assert load("int8", tmp_path)
    assert "prepared weights wan_demo.int8.float32." in caplog.text
    assert "are not kept: " in caplog.text


def test_large_weights_are_parted_over_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "SHARD_BYTES", 500_000)
    first = frames(load("int8", tmp_path))
    assert len(list(tmp_path.rglob("*.safetensors"))) > 3
    assert torch.equal(frames(load("int8", tmp_path)), first)


def test_the_recipe_is_in_what_is_kept_and_is_not_added_twice(tmp_path: Path) -> None:
    lora = write_lora(tmp_path, "recipe", lora_layers(1, gain=0.1))
    recipe = {"adapter": "recipe", "target": "transformer", "weight": 1.0}
    model = dataclasses.replace(DEMO, id="distilled", recipe_loras=(recipe,))
    weights = dataclasses.replace(WEIGHTS, loras=(lora,))
    wide, first = (frames(load(kind, tmp_path, weights, model)) for kind in ("none", "int8"))
    assert torch.equal(frames(load("int8", tmp_path, weights, model)), first)
    assert (first - wide).abs().mean() < 0.5 * (first - frames(load("int8", tmp_path))).abs().mean()


def test_weights_that_are_read_back_can_be_dropped_by_the_system(tmp_path: Path) -> None:
    changed = [quantization.load(ModelSource(DEMO, "t2v", WEIGHTS, "int8"), CPU, tmp_path)[1].changed for _ in range(2)]
    assert changed == [True, False]
