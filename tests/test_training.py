"""The script that trains the embedded model still works: a few steps of everything, and what comes out loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from tests.daemon import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diffusers folder of a quick training."""
    base = tmp_path_factory.mktemp("training")
    command = [
        sys.executable,
        "-m",
        "tools.train_demo",
        "--run",
        str(base / "run"),
        "--out",
        str(base / "out"),
        "--quick",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
    return base / "out"


@pytest.mark.parametrize("cls", [WanPipeline, WanImageToVideoPipeline])
def test_a_quick_training_leaves_a_folder_that_both_pipelines_load(folder: Path, cls: type) -> None:
    pipe = cls.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    assert pipe.config.expand_timesteps
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 10 * 2**20


def test_what_it_leaves_makes_a_clip(folder: Path) -> None:
    torch.set_num_threads(1)
    pipe = WanPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    clip = pipe("a red circle", height=32, width=48, num_frames=5, num_inference_steps=2, output_type="pt").frames
    assert clip.shape == (1, 5, 3, 32, 48)
    assert torch.isfinite(clip).all()
