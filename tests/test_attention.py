"""Attention kernels: named ones are there or stop the start, and `auto` takes the fastest that gives exact results."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

import wangpd
from engine import capabilities
from engine.capabilities import KERNELS, attention_fault
from engine.catalog.models import Catalog
from engine.gpu.load import kernels
from engine.job import EngineError

CATALOG = Catalog.load()
QUERY = torch.randn(1, 64, 2, 16, generator=torch.Generator().manual_seed(0))
MISSING = [name for name, kernel in KERNELS.items() if not kernel.installed]


def test_a_kernel_that_is_not_installed_is_told_with_the_command() -> None:
    assert "flash" in MISSING
    for name in MISSING:
        assert attention_fault(name).startswith(f"attention_mode: '{name}' needs a package")
        assert attention_fault(name).endswith(f"pip install '{KERNELS[name].install}'")


@pytest.mark.parametrize("mode", ["auto", "sdpa"])
def test_what_torch_brings_needs_nothing(mode: str) -> None:
    assert attention_fault(mode) == ""


def test_a_missing_kernel_stops_the_start_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wangpd.toml").write_text('attention_mode = "flash"\n')
    assert wangpd.main(["--config", str(tmp_path / "wangpd.toml"), "--check-config"]) == 2
    assert "pip install 'flash-attn'" in capsys.readouterr().err


@pytest.mark.parametrize("winner", ["sdpa", "cudnn"])
def test_auto_takes_the_fastest(winner: str) -> None:
    assert kernels.fastest(QUERY, lambda backend, _: 1.0 if backend == KERNELS[winner].backend else 2.0) == winner


def test_a_kernel_that_fails_is_left_out() -> None:
    def clock(backend: str, _: torch.Tensor) -> float:
        if backend == KERNELS["sdpa"].backend:
            return 9.0
        raise RuntimeError("no kernel for this card")

    assert kernels.fastest(QUERY, clock) == "sdpa"


def test_where_nothing_can_be_measured_torch_decides() -> None:
    def clock(_backend: str, _query: torch.Tensor) -> float:
        raise RuntimeError

    assert kernels.fastest(QUERY, clock) == "sdpa"


def test_auto_never_takes_a_kernel_that_rounds_to_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "find_spec", lambda _: True)
    tried: list[str] = []
    kernels.fastest(QUERY, lambda backend, _: float(not tried.append(backend)))
    assert not {KERNELS[name].backend for name in ("sage", "sage2")} & set(tried)


def test_a_kernel_is_really_timed() -> None:
    assert kernels.seconds("native", QUERY) > 0


class Denoiser:
    """What set_kernel sees of a denoiser."""

    def __init__(self, fault: str = "") -> None:
        self.config = {"num_attention_heads": 2, "attention_head_dim": 16}
        self.backend, self._fault = "", fault

    def set_attention_backend(self, backend: str) -> None:
        if self._fault:
            raise RuntimeError(self._fault)
        self.backend = backend


CUDA = torch.device("cuda")


def pair(**options: Any) -> Any:
    return SimpleNamespace(transformer=Denoiser(**options), transformer_2=Denoiser(**options))


def test_both_experts_get_the_kernel_that_was_named() -> None:
    pipe = pair()
    assert kernels.set_kernel(pipe, "sage2", CUDA, 1000) == "sage2"
    assert pipe.transformer.backend == pipe.transformer_2.backend == KERNELS["sage2"].backend


def test_a_named_kernel_that_the_card_refuses_is_an_error_with_its_name() -> None:
    with pytest.raises(EngineError, match=r"^attention_mode 'flash3' does not work here: needs Hopper$"):
        kernels.set_kernel(pair(fault="needs Hopper"), "flash3", CUDA, 1000)


def test_the_measurement_is_made_once_for_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(kernels, "_measured", cache(kernels._measured.__wrapped__))
    monkeypatch.setattr(kernels.torch, "randn", lambda *shape, **_: measured.append(shape[1]) or QUERY)
    monkeypatch.setattr(kernels, "fastest", lambda *_: "cudnn")
    for tokens in (1000, 1010, 5000):
        assert kernels.set_kernel(pair(), "auto", CUDA, tokens) == "cudnn"
    assert measured == [512, 4096]


def test_a_backend_that_one_model_needs_is_not_the_next_ones() -> None:
    model = CATALOG.get("k5_lite_t2v_10s")
    assert model.attention_backend == "flex"
    tiny = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=12, ffn_dim=8, num_layers=1, text_dim=8)
    kernels.set_backend(tiny, "flex")
    active, _ = _AttentionBackendRegistry.get_active_backend()
    assert active.value == "native"
    assert tiny.blocks[0].attn1.processor._attention_backend.value == "flex"


def test_a_cpu_keeps_what_diffusers_takes_by_itself() -> None:
    pipe = pair()
    assert kernels.set_kernel(pipe, "auto", torch.device("cpu"), 1000) == "sdpa"
    assert pipe.transformer.backend == ""
