"""Context parallelism: several processes that compute each call of a denoiser together, on CPUs here."""

import inspect
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine import capabilities
from engine.catalog.models import PACKAGE, Catalog
from engine.gpu import worker
from engine.gpu.process import LOCAL_ONLY, Rank
from engine.gpu.team import sharing
from engine.job import EngineError
from engine.planning.machine import Machine
from engine.planning.placement import plan
from engine.planning.work import Work
from engine.workers.local import Engine
from tests import stand_ins
from tests.daemon import Daemon
from tests.frames import read_video
from tests.processes import alive, children, command, eventually, workers
from tests.stand_ins import job
from tests.test_loras import layers, written

CATALOG = Catalog.load()
DEMO = CATALOG.get("wan_demo")
TWO = {"devices": ["cpu", "cpu"], "context_parallel": True}
QUICK = {"prompt": "a red circle moving right", "num_inference_steps": 6, "video_length": 9, "seed": 7}
LONG = {"num_inference_steps": 100, "video_length": 17, "repeat_generation": 4}
CARD = Machine(free_vram_bytes=24 * 10**9, free_ram_bytes=64 * 10**9)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose worker has one follower."""
    folder = tmp_path_factory.mktemp("team")
    written(folder / "loras", "strong", layers(1))
    with Daemon(folder, video_crf=0, **TWO) as running:
        yield running


@pytest.fixture(scope="module")
def single(team: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The same with one process."""
    with Daemon(tmp_path_factory.mktemp("single"), video_crf=0, loras_dir=str(team.folder / "loras")) as running:
        yield running


def frames(daemon: Daemon, **fields: Any) -> NDArray[np.float64]:
    return read_video(daemon.made(daemon.run(**QUICK | fields))).astype(float)


def followers(daemon: Daemon) -> set[int]:
    (lead,) = workers(daemon)
    return {pid for pid in children(lead) if "spawn_main" in command(pid)}


# ---- what a team makes


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 1.0, "seed": 8},
        {"skip_steps_cache_type": "mag", "skip_steps_multiplier": 2.0},
        {"skip_steps_cache_type": "tea", "skip_steps_multiplier": 2.0},
        {"skip_steps_cache_type": "taylorseer", "skip_steps_multiplier": 2.0},
        {"activated_loras": ["strong"], "loras_multipliers": "1;0,1"},
        {"video_length": 33, "sliding_window_size": 17},
    ],
    ids=["plain", "one pass", "mag", "tea", "taylorseer", "lora", "windows"],
)
def test_a_team_makes_the_frames_of_one_process(team: Daemon, single: Daemon, fields: dict[str, Any]) -> None:
    assert np.array_equal(frames(team, **fields), frames(single, **fields))


def test_the_first_block_cache_skips_what_all_agree_on(team: Daemon, single: Daemon) -> None:
    cached = {"skip_steps_cache_type": "fbc", "skip_steps_multiplier": 2.0, "num_inference_steps": 12}
    made, whole = frames(team, **cached), frames(team, num_inference_steps=12)
    assert np.abs(made - whole).mean() > 0
    assert np.abs(made - whole).mean() <= np.abs(frames(single, **cached) - whole).mean()


def test_a_model_whose_heads_can_not_be_spread_is_made_by_the_first_device_alone(team: Daemon) -> None:
    folder = team.models / "one_head"
    shutil.copytree(PACKAGE / DEMO.builtin, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    changed = config | {"num_attention_heads": 1, "attention_head_dim": width}
    (folder / "transformer" / "config.json").write_text(json.dumps(changed))
    entry = '[[models]]\nid = "one_head"\nbase = "wan_demo"\nbuiltin = ""\nname = "One head"\n'
    (team.models / "own.toml").write_text(entry)
    with Daemon(team.folder / "restarted", models_dir=str(team.models), **TWO) as daemon:
        assert daemon.run(**QUICK, model_type="one_head")["status"] == "completed"
        assert "together" not in daemon.get("/config").json()["data"]["memory_plan"]


def test_the_plan_tells_how_many_work_together(team: Daemon) -> None:
    team.run(**QUICK)
    assert "2 devices together" in team.get("/config").json()["data"]["memory_plan"]


# ---- what ends a task


def test_a_cancelled_task_leaves_the_team_as_it_is(team: Daemon) -> None:
    team.run(**QUICK)
    before = workers(team) | followers(team)
    task_id = team.submit(**LONG)["task_id"]
    team.until(task_id, lambda state: state["current_step"] > 3)
    team.delete(f"/queue/{task_id}")
    assert team.finish(task_id)["status"] == "cancelled"
    assert team.run(**QUICK)["status"] == "completed"
    assert workers(team) | followers(team) == before


def test_a_call_that_fails_costs_its_task_and_the_followers(team: Daemon) -> None:
    team.run(**QUICK)
    lead, before = workers(team), followers(team)
    odd = team.finish(team.submit(**QUICK, resolution="80x80")["task_id"])  # 5 x 5 x 3 tokens, which gloo can't share
    assert (odd["status"], odd["error"]["message"].partition(" while ")[2][:9]) == ("failed", "denoising")
    assert team.run(**QUICK)["status"] == "completed"
    assert workers(team) == lead
    assert len(followers(team)) == 1
    assert followers(team) != before


def test_a_follower_that_dies_takes_its_task_with_it_and_no_other(team: Daemon) -> None:
    task_id, later = (team.submit(**fields)["task_id"] for fields in (LONG, QUICK))
    team.until(task_id, lambda state: state["current_step"] > 3)
    (follower,) = followers(team)
    os.kill(follower, signal.SIGKILL)
    assert team.finish(task_id)["error"]["code"] == "worker_died"
    assert team.finish(later)["status"] == "completed"


def test_no_process_of_a_team_outlives_its_daemon(tmp_path: Path) -> None:
    with Daemon(tmp_path, **TWO) as daemon:
        daemon.run(**QUICK)
        processes = workers(daemon) | followers(daemon)
        assert len(processes) == 2
        os.kill(daemon.process.pid, signal.SIGKILL)
        assert eventually(lambda: not any(map(alive, processes)))


@pytest.mark.parametrize(
    "exhausted", [stand_ins.run_out_of_memory_once, stand_ins.run_out_of_memory_while_placing], ids=["call", "placing"]
)
async def test_out_of_memory_the_whole_team_tries_once_more(
    exhausted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "generate", exhausted)
    engine = Engine(stand_ins.config(tmp_path, device="cpu", team=("cpu",)))
    result = await engine.run(1, job("a red circle", steps=2, frames=5), DEMO)
    engine.close()
    assert [file.frames for file in result.files] == [5]


async def test_a_device_of_a_team_that_is_missing_is_told(tmp_path: Path) -> None:
    engine = Engine(stand_ins.config(tmp_path, device="cpu", team=("cuda:7",)))
    for task_id in (1, 2):  # each tries again
        with pytest.raises(EngineError, match="'cuda:7' is not available") as fault:
            await engine.run(task_id, job(), DEMO)
        assert fault.value.code == "no_device"
    assert engine.device == "cpu + cuda:7"
    engine.close()


# ---- the share of each


def _share(rank: Rank, cls: str, config: dict[str, Any], inputs: dict[str, Any]) -> tuple[int, int, float]:
    """In a process of its own: tokens of all and of this process's share, and the largest error of the result."""
    os.environ.update(LOCAL_ONLY)
    torch.manual_seed(0)
    denoiser = getattr(diffusers, cls)(**config).eval()
    seen: list[int] = []
    denoiser.blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    with torch.no_grad():
        whole = denoiser(**inputs, return_dict=False)[0]
        group = sharing.Group(rank, torch.device("cpu"))
        pipe = typing.cast("Any", _Pipe({"transformer": denoiser}))
        with group.shared(pipe):
            shared = denoiser(**inputs, return_dict=False)[0]
        denoiser(**inputs, return_dict=False)
    group.leave()
    assert seen[0] == seen[2]  # afterwards it is as it was
    return seen[0], seen[1], float((whole - shared).abs().max())


class _Pipe:
    def __init__(self, components: dict[str, Any]) -> None:
        self.components = components


SHAPE = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
DENOISERS = {
    "WanTransformer3DModel": SHAPE,
    "WanVACETransformer3DModel": {**SHAPE, "vace_layers": [0, 2], "vace_in_channels": 8},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    """Two processes."""
    with multiprocessing.get_context("spawn").Pool(2) as two:
        yield two


@pytest.mark.parametrize("cls", DENOISERS)
def test_each_process_computes_half_of_the_tokens_and_has_the_whole_result(cls: str, pool: Any, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 8, 8, generator=rng),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 12, 32, generator=rng),
    }
    if "VACE" in cls:
        inputs["control_hidden_states"] = torch.randn(1, 8, 3, 8, 8, generator=rng)
    ranks = [Rank(number, 2, "cpu", tmp_path / "a rendezvous #1") for number in range(2)]
    results = pool.starmap(_share, [(rank, cls, DENOISERS[cls], inputs) for rank in ranks], chunksize=1)
    assert [result[:2] for result in results] == [(48, 24), (48, 24)]
    assert max(result[2] for result in results) < 1e-5


def test_the_catalogue_tells_which_classes_can_be_shared() -> None:
    classes = {name: one for model in CATALOG for name, one in ((p.cls, p) for p in model.pipelines.values())}
    known = {name for name in classes if not name.startswith(UNPROVEN) and _plan_of(name)}
    assert {name for name, pipeline in classes.items() if pipeline.context_parallel} == known


# As diffusers 0.42.1 says that these are shared, it fails: on sizes that don't match (LTX), and on 40 blocks that are
# named where there may be fewer (Helios).
UNPROVEN = ("LTX", "Helios")


def _plan_of(pipeline: str) -> bool:
    """Diffusers, or this project, says how the denoiser of this pipeline is shared."""
    parameter = inspect.signature(getattr(diffusers, pipeline, object)).parameters.get("transformer")
    kinds = typing.get_args(parameter.annotation) or (parameter.annotation,) if parameter else ()
    return any(hasattr(kind, "_cp_plan") and sharing.plan_of(kind) for kind in kinds)


def _exchanged(rank: Rank) -> Any:
    """In a process of its own: the lead's arguments as they reach this process, its tensors as lists."""
    os.environ.update(LOCAL_ONLY)
    one = torch.tensor(3).expand(4)
    arguments = ((one, [torch.zeros(0, 2), None]), {"scale": 1.5, "mask": torch.tensor([True, False])})
    blanks = pickle.loads(pickle.dumps(sharing.blanked(arguments)))
    group = sharing.Group(rank, torch.device("cpu"))
    if rank.number == 0:
        group.send(arguments)
    found = arguments if rank.number == 0 else group.receive(blanks)
    group.leave()
    (first, (empty, none)), named = found
    return first.tolist(), tuple(empty.shape), none, named["scale"], named["mask"].tolist()


def test_arguments_reach_another_process_as_they_were(pool: Any, tmp_path: Path) -> None:
    ranks = [Rank(number, 2, "cpu", tmp_path / "rendezvous") for number in range(2)]
    sent, received = pool.map(_exchanged, ranks, chunksize=1)
    assert sent == received == ([3] * 4, (0, 2), None, 1.5, [True, False])


def test_the_entry_of_a_follower_brings_in_no_torch() -> None:
    check = "import engine.gpu.team.entry, sys; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


# ---- what is planned and refused


@pytest.mark.parametrize(
    ("heads", "count", "possible"), [(40, 8, True), (12, 8, False), (12, 5, False), (24, 5, True), (1, 2, False)]
)
def test_heads_are_spread_if_each_device_gets_some(heads: int, count: int, possible: bool) -> None:
    assert capabilities.heads_split(heads, count) is possible


def test_two_cards_take_little_more_than_half_of_the_time_of_a_step() -> None:
    model = CATALOG.get("wan_t2v_14B")
    one, two = (plan(model, Work.usual(model), replace(CARD, cards=cards)) for cards in (1, 2))
    assert 0.5 * one.step_s < two.step_s < 0.6 * one.step_s
    assert (one.cards, two.cards) == (1, 2)


def test_a_model_that_can_not_be_shared_is_planned_for_one_card() -> None:
    model = next(model for model in CATALOG if not model.context_parallel and model.kind == "video")
    assert plan(model, Work.usual(model), replace(CARD, cards=2)) == plan(model, Work.usual(model), CARD)


@pytest.mark.parametrize(
    ("devices", "mode", "words"),
    [
        ([], "auto", "devices must name those that work together"),
        (["cuda:0"], "auto", "devices must name those that work together"),
        (["cuda:0", "cpu"], "auto", "must be of one kind, and are cpu and cuda"),
        (["cuda:0", "cuda:0"], "auto", "must name each card once"),
        (["cuda:0", "cuda:1"], "xformers", "'xformers' does not work with it; choose auto, sdpa"),
    ],
)
def test_what_can_not_work_together_stops_the_start(devices: list[str], mode: str, words: str) -> None:
    assert words in capabilities.team_fault(devices, mode)
    assert capabilities.team_fault(["cuda:0", "cuda:1"], "sdpa") == ""


def test_a_configuration_without_devices_names_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from wangpd import main

    (tmp_path / "wangpd.toml").write_text("context_parallel = true\n")
    assert main(["--config", str(tmp_path / "wangpd.toml")]) == 2
    assert "context_parallel: devices must name" in capsys.readouterr().err
