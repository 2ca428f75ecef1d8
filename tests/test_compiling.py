"""Compiled blocks: the frames stay, what was compiled is found again, and what can't be compiled runs as it is."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from engine import capabilities
from engine.admission import resolve
from engine.api.config import ConfigError, load_config
from engine.catalog.models import PACKAGE, Catalog
from engine.catalog.weights import Weights
from engine.gpu import process
from engine.gpu.load import pipelines
from engine.gpu.load.compiling import Block, compile_blocks, suit
from engine.gpu.run import render
from engine.gpu.run.meter import Meter
from engine.job import Board, EngineConfig, Job, Lora, Phase
from engine.workers.local import LOADING_PATIENCE, Engine

CATALOG = Catalog.load()
DEMO = CATALOG.get("wan_demo")
# The compiler's own modules use what torch is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
LIKENESS = 60.0  # dB, of compiled to plain frames: 95 were seen, and two seeds are 20 apart


def job(**changes: Any) -> Job:
    sent = {"prompt": "a red circle moving right", "seed": 3, "num_inference_steps": 4, "video_length": 5}
    return dataclasses.replace(resolve(CATALOG, DEMO, sent, {}).job, **changes)


def loaded() -> Any:
    torch.set_num_threads(1)
    return pipelines.load(DEMO, DEMO.pipelines["t2v"], Weights(PACKAGE / "demo"), torch.device("cpu"))


def frames(pipe: Any, wanted: Job) -> Any:
    (clip,) = render.render(pipe, DEMO, wanted, Meter(Board(), 1))
    assert clip.frames is not None
    return torch.cat(list(clip.frames)).numpy().astype(float)


def psnr(one: Any, other: Any) -> float:
    return float(10 * np.log10(255**2 / max(1e-12, np.mean((one - other) ** 2))))


# ---- compiled for true: one kernel is built for all tests of this part


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of what is compiled, for this process."""
    state = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in capabilities.compile_environment(state).items():
            patch.setenv(name, value)
        yield state / "compiled"


@pytest.fixture(scope="module")
def compiled() -> Any:
    """The embedded model with compiled blocks."""
    pipe = loaded()
    assert compile_blocks(pipe) == len(pipe.transformer.blocks)
    return pipe


def stats(group: str, name: str) -> int:
    return int(torch._dynamo.utils.counters[group][name])


@pytest.mark.slow
def test_frames_of_compiled_blocks_are_those_of_plain_ones(compiled: Any, cache: Path) -> None:
    assert psnr(frames(compiled, job()), frames(loaded(), job())) > LIKENESS
    assert stats("stats", "unique_graphs") == 1  # four blocks and two passes share it
    assert any(cache.rglob("*.so"))


@pytest.mark.slow
def test_a_step_cache_leaves_out_compiled_blocks_as_it_does_plain_ones(compiled: Any) -> None:
    skipping = job(skip_steps_cache_type="mag", skip_steps_multiplier=2.0, skip_steps_start_step_perc=0.0)
    short = frames(compiled, skipping)
    assert psnr(short, frames(loaded(), skipping)) > LIKENESS
    assert psnr(short, frames(compiled, job())) < LIKENESS


@pytest.mark.slow
@pytest.mark.parametrize("cache_type", ["taylorseer"])
def test_layers_that_are_hooked_one_by_one_run_plain_and_the_next_task_compiled(compiled: Any, cache_type: str) -> None:
    skipping = job(skip_steps_cache_type=cache_type, skip_steps_multiplier=2.0, skip_steps_start_step_perc=0.0)
    assert np.array_equal(frames(compiled, skipping), frames(loaded(), skipping))
    frames(compiled, job())
    assert not compiled.transformer.blocks[0].forward.plain


@pytest.mark.slow
def test_a_new_process_finds_what_was_compiled(compiled: Any, cache: Path) -> None:
    before = frames(compiled, job())
    files = sorted(cache.rglob("*.so"))
    torch._dynamo.reset()  # forget what this process holds; the files stay
    torch._dynamo.utils.counters.clear()
    pipe = loaded()
    compile_blocks(pipe)
    assert np.array_equal(frames(pipe, job()), before)
    assert stats("inductor", "fxgraph_cache_hit") == 1
    assert stats("inductor", "fxgraph_cache_miss") == 0
    assert sorted(cache.rglob("*.so")) == files


# ---- what runs plain


class Part(nn.Module):
    """A denoiser of one block with one layer."""

    _repeated_blocks = ("Sequential",)

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(2, 2))
        self.dtype = torch.float32


def small() -> Any:
    part = Part()
    pipe = SimpleNamespace(transformer=part, components={"transformer": part}, _execution_device=torch.device("cpu"))
    assert compile_blocks(pipe) == 1
    return pipe


def is_plain(pipe: Any) -> bool:
    block = pipe.transformer.block.forward
    assert isinstance(block, Block)
    return block.plain


def test_a_task_with_a_lora_runs_plain_and_the_next_one_compiled() -> None:
    pipe = small()
    suit(pipe, job(loras=(Lora(Path("a.safetensors"), ((1.0,),)),)))
    assert is_plain(pipe)
    suit(pipe, job())
    assert not is_plain(pipe)


def test_a_block_of_which_a_layer_is_hooked_runs_plain() -> None:
    pipe = small()
    layer = pipe.transformer.block[0]
    HookRegistry.check_if_exists_or_initialize(layer).register_hook(ModelHook(), "offloaded")
    suit(pipe, job())
    assert is_plain(pipe)
    layer._diffusers_hook.remove_hook("offloaded")
    suit(pipe, job())
    assert not is_plain(pipe)


def test_a_block_that_is_hooked_as_a_whole_is_compiled_within_the_hook() -> None:
    pipe = small()
    block, inner = pipe.transformer.block, pipe.transformer.block.forward
    HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "offloaded")
    suit(pipe, job())
    assert not inner.plain
    inner.plain = True
    assert block(torch.ones(1, 2)).shape == (1, 2)
    block._diffusers_hook.remove_hook("offloaded")
    assert block.forward is inner


def test_a_plain_block_computes_what_it_always_did() -> None:
    pipe = small()
    pipe.transformer.block.forward.plain = True
    seen = torch.ones(1, 2)
    assert torch.equal(pipe.transformer.block(seen), pipe.transformer.block[0](seen))


def test_a_class_that_names_no_blocks_stays_as_it_is() -> None:
    assert compile_blocks(SimpleNamespace(components={"transformer": nn.Linear(2, 2)})) == 0


# ---- the start


def test_without_a_compiler_the_daemon_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (tmp_path / "wangpd.toml").write_text("compile = true\n")
    with pytest.raises(ConfigError, match=r"^compile: true needs a C\+\+ compiler, and 'no-such-compiler'"):
        load_config(tmp_path / "wangpd.toml", {})


def test_on_a_card_triton_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(capabilities, "find_spec", lambda _: None)
    assert capabilities.compile_fault("cuda:1").startswith("compile: true needs triton on device 'cuda:1'; install it:")
    assert capabilities.compile_fault("cpu") == ""


def test_without_the_key_nothing_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (tmp_path / "wangpd.toml").write_text("")
    assert not load_config(tmp_path / "wangpd.toml", {}).compile


@pytest.mark.parametrize("wanted", [True, False])
def test_the_worker_keeps_what_it_compiles_in_the_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    names = capabilities.compile_environment(tmp_path).keys()
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    process.prepare(EngineConfig(tmp_path, tmp_path, state_path=tmp_path, compile=wanted), "cpu", None)
    assert all((os.environ.get(name, "").startswith(str(tmp_path / "compiled"))) == wanted for name in names)


@pytest.mark.parametrize(("step", "times"), [(0, LOADING_PATIENCE), (1, 1)])
def test_the_first_step_may_take_as_long_as_loading(tmp_path: Path, step: int, times: int) -> None:
    board = Board(phase=Phase.DENOISING, step=step)
    assert Engine(EngineConfig(tmp_path, tmp_path, compile=True))._patience_s(board, 10) == times * 10
    assert Engine(EngineConfig(tmp_path, tmp_path))._patience_s(board, 10) == 10
