"""Measure what step caches need to know of a model, and print it as TOML for engine/calibration.toml.

    python -m tools.calibrate_caches engine/demo --name wan_demo --steps 20

For a pipeline of Wan's classes. MagCache: the mean ratio of the size of what the blocks add, from step to step.
TeaCache: a polynomial from the relative change of the time embedding to that of what the blocks add. Both over the pass
with the prompt, the mean of several prompts.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

from engine.gpu.run.caching import embedding_changes

PROMPTS = (
    "a red circle moving right",
    "a small blue square moving up on a gray background",
    "a large yellow triangle moving left",
    "a green circle that stays still on white",
)
DEGREE = 4


class Recorder:
    """What the blocks of a denoiser add to their input, call by call."""

    def __init__(self, denoiser: Any) -> None:
        self.residuals: list[torch.Tensor] = []
        self._input = torch.empty(0)
        denoiser.blocks[0].register_forward_pre_hook(self._before)
        denoiser.blocks[-1].register_forward_hook(self._after)

    def _before(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._input = args[0]

    def _after(self, _module: Any, _args: Any, output: torch.Tensor) -> None:
        self.residuals.append(output - self._input)


def measured(pipe: WanPipeline, prompt: str, steps: int, seed: int) -> tuple[list[float], list[float]]:
    """For each step but the first: the ratio of the sizes, and the relative change, of the residual with the prompt."""
    recorder = Recorder(pipe.transformer)
    generator = torch.Generator().manual_seed(seed)
    frames, side = 17, 64
    pipe(prompt, num_frames=frames, height=side, width=side, num_inference_steps=steps, guidance_scale=2.5,
         generator=generator, output_type="latent")  # fmt: skip
    pairs = list(
        zip(recorder.residuals[0:-2:2], recorder.residuals[2::2], strict=True)
    )  # every other call has no prompt
    ratios = [(now.norm(dim=-1) / then.norm(dim=-1)).mean().item() for then, now in pairs]
    changes = [((now - then).abs().mean() / then.abs().mean()).item() for then, now in pairs]
    return ratios, changes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="pipeline in diffusers layout")
    parser.add_argument("--name", required=True, help="name of the calibration")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    pipe = WanPipeline.from_pretrained(options.folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    runs = [measured(pipe, prompt, options.steps, seed) for seed, prompt in enumerate(PROMPTS)]
    ratios, changes = (np.mean([run[i] for run in runs], axis=0) for i in range(2))
    embedded = embedding_changes(pipe.transformer, pipe.scheduler.timesteps)
    coefficients = np.polyfit(embedded, changes, DEGREE)
    print(f'[magcache."{options.name}"]\nratios = {[1.0, *(round(float(ratio), 5) for ratio in ratios)]}\n')
    print(f'[teacache."{options.name}"]\ncoefficients = {[float(f"{value:.9g}") for value in coefficients]}')


if __name__ == "__main__":
    main()
