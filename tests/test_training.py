"""The script that trains the embedded model still works: a few steps of everything, and what comes out loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from tests.daemon import ROOT
from tools.demo import latents, shapes, vae


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


def test_a_phase_of_squares_trains_the_decoder_on_what_psnr_counts() -> None:
    torch.set_num_threads(1)
    scale = latents.measure_scale()
    model = vae.build_vae(scale)
    crop = (5, 16, 16)
    phase = vae.Phase(steps=1, lr=1e-3, crops=(crop,), pixels=1280, noise=0, squares=True)
    sample = vae.draw_sample("one", crop, phase)
    with torch.no_grad():
        guess = vae.decode_unclamped(model, latents.encode(sample.scenes, sample.mask))
        loss = vae.decoder_loss(model, scale, sample)
    error = guess - shapes.paint(sample.scenes, sample.mask)
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-4)
