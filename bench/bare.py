"""Diffusers without wangpd: what bench/engine.py compares the daemon with, in a process of its own.

Usage: python bench/bare.py serve WEIGHTS FILE JOB    a line in, a video made, a line out; JOB is a request as JSON
       python bench/bare.py make FOLDER SHAPE         a Wan denoiser of random weights; SHAPE: its configuration as JSON
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline, WanTransformer3DModel

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its engine.py is not the package

from engine.gpu.save.encode import write_video  # noqa: E402

FPS = 8


def serve(weights: Path, file: Path, job: Mapping[str, Any]) -> None:
    """Make the same video for each line of the input. It is written by the daemon's encoder, without loss."""
    pipe = WanPipeline.from_pretrained(weights, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=job["flow_shift"])
    width, height = map(int, job["resolution"].split("x"))
    for _ in sys.stdin:
        frames = pipe(
            prompt=job["prompt"],
            negative_prompt=job["negative_prompt"],
            width=width,
            height=height,
            num_frames=job["video_length"],
            num_inference_steps=job["num_inference_steps"],
            guidance_scale=job["guidance_scale"],
            generator=torch.Generator("cpu").manual_seed(job["seed"]),
            max_sequence_length=64,
            output_type="np",
        ).frames[0]
        write_video(file, (frames * 255).round().astype(np.uint8), FPS, None, crf=0)
        print("done", flush=True)


def make(folder: Path, shape: Mapping[str, Any]) -> None:
    """Save a denoiser of this shape, the same at each call."""
    torch.manual_seed(0)
    WanTransformer3DModel.from_config(shape).save_pretrained(folder)


if __name__ == "__main__":
    command, *arguments, about = sys.argv[1:]
    {"serve": serve, "make": make}[command](*map(Path, arguments), json.loads(about))
