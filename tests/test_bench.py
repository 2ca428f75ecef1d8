"""The benchmarks run: what they measure is not asserted here."""

import subprocess
import sys

import pytest

from engine.catalog.models import Catalog
from tests.daemon import ROOT


def printed(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280, check=True
    )
    return run.stdout


def test_the_gpu_benchmark_runs_on_any_machine() -> None:
    table = printed("bench/gpu.py", "--device", "cpu", "--tiny")
    assert "| step, attention native | " in table
    assert "| VAE decode, fp32 | " in table
    ways = ("int8 weights", "nf4 weights", "swapped", "streamed, pinned", "2 devices together")
    assert all(f"| step, {name} | " in table for name in ways)
    assert "| step, fp8 weights: transformer_quantization: 'fp8' does not work on device 'cpu'" in table


def test_the_gpu_benchmark_lists_every_family() -> None:
    table = printed("bench/gpu.py", "--families")
    assert all(f"| {family} | " in table for family in {model.family for model in Catalog.load()})


@pytest.mark.slow
def test_the_engine_benchmark_compares_the_daemon_with_bare_diffusers_frame_by_frame() -> None:
    table = printed("bench/engine.py", "--quick", "--rounds", "1")
    (bare,) = [line for line in table.splitlines() if line.startswith("| wangpd over HTTP instead of bare diffusers |")]
    assert bare.endswith("| same |")
    assert "| second task instead of the first | " in table
    assert "| step cache mag, 2x | " in table
