"""The benchmarks run: what they measure is not asserted here."""

import subprocess
import sys

from engine.catalog import Catalog
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


def test_the_gpu_benchmark_lists_every_family() -> None:
    table = printed("bench/gpu.py", "--families")
    assert all(f"| {family} | " in table for family in {model.family for model in Catalog.load()})
