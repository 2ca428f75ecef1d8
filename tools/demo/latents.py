"""Hand-made latents: the space is decided, not learnt.

Sixteen numbers describe a block of 4 frames x 8 x 8 pixels: low-order cosine coefficients in three colour axes.
They are linear in the picture, so the transformer can train before any VAE exists, and the VAE becomes two plain
regressions. A learnt latent space of this size blurred the shapes and cost most of the training time.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from .scene import Scene, place, sample_traits
from .shapes import masks, palette

BLOCK_FRAMES, BLOCK_SIDE = 4, 8
CHANNELS = 16
STATISTICS_SCENES = 1024

# The first axis tells every shape colour from every background (58 of 255 apart at least): plain luma does not,
# orange and purple are as bright as gray, and the fine coefficients are kept along this axis only.
# The other two are pure chroma, so a plain background is zero in them.
_COLOR_AXES = torch.tensor([[0.194, 0.130, 0.972], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
# (order in t, y, x), colour axis
_TERMS = (
    *(((0, 0, 0), axis) for axis in range(3)),
    *(((0, 0, 1), axis) for axis in range(3)),
    *(((0, 1, 0), axis) for axis in range(3)),
    *((order, 0) for order in ((1, 0, 0), (0, 0, 2), (0, 2, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (2, 0, 0))),
)


class Scale(NamedTuple):
    """Per-channel mean and deviation, (16,) each; the VAE's config carries them as latents_mean and latents_std."""

    mean: Tensor
    std: Tensor

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents of the VAE → what the transformer sees."""
        return (latents - _channelwise(self.mean)) / _channelwise(self.std)

    def restore(self, latents: Tensor) -> Tensor:
        """The inverse of normalize."""
        return latents * _channelwise(self.std) + _channelwise(self.mean)


def _channelwise(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)


def _cosine(order: int, length: int) -> Tensor:
    """A cosine of unit mean square."""
    wave = torch.cos(math.pi * order * (torch.arange(length) + 0.5) / length)
    return wave * (math.sqrt(2) if order else 1)


def _basis() -> Tensor:
    """(block pixels, 16): what each channel correlates a block with."""
    waves = [
        _cosine(t, BLOCK_FRAMES)[:, None, None] * _cosine(y, BLOCK_SIDE)[:, None] * _cosine(x, BLOCK_SIDE)
        for (t, y, x), _ in _TERMS
    ]
    return torch.stack([wave.flatten() for wave in waves], dim=1) / (BLOCK_FRAMES * BLOCK_SIDE**2)


AXES = _COLOR_AXES / _COLOR_AXES.norm(dim=1, keepdim=True)
BASIS = _basis()
AXIS_OF_CHANNEL = torch.tensor([axis for _, axis in _TERMS])
# How fine a detail of one moment a channel is: 0 for the means and for what moves, 1 for slopes, 2 for the finest.
FINENESS = torch.tensor([0.0 if t else float(y + x) for (t, y, x), _ in _TERMS])
IS_MEAN = torch.tensor([float(order == (0, 0, 0)) for order, _ in _TERMS])


def _blocks(mask: Tensor) -> Tensor:
    """(N, 4k+1, H, W) → (N, k+1, H/8, W/8, 256); the first frame fills a block of its own, as in Wan's causal VAE."""
    mask = torch.cat([mask[:, :1].expand(-1, BLOCK_FRAMES - 1, -1, -1), mask], dim=1)
    n, frames, height = mask.shape[:3]
    grid = mask.view(n, frames // BLOCK_FRAMES, BLOCK_FRAMES, height // BLOCK_SIDE, BLOCK_SIDE, -1, BLOCK_SIDE)
    return grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(-3)


def encode(scenes: list[Scene], mask: Tensor) -> Tensor:
    """Latents of the clips that `paint(scenes, mask)` shows: (N, 16, k+1, H/8, W/8), not normalized."""
    front, back = (color @ AXES.T for color in palette(scenes))
    contrast = _channelwise_rows((front - back)[:, AXIS_OF_CHANNEL])
    base = _channelwise_rows(back[:, AXIS_OF_CHANNEL] * IS_MEAN)
    return (_blocks(mask) @ BASIS).permute(0, 4, 1, 2, 3) * contrast + base


def _channelwise_rows(values: Tensor) -> Tensor:
    return values[:, :, None, None, None]


def measure_scale() -> Scale:
    """Mean and deviation over a fixed set of scenes, rounded as the config stores them."""
    rng = random.Random("scale")
    scenes = [place(sample_traits(rng), rng) for _ in range(STATISTICS_SCENES)]
    latents = encode(scenes, masks(scenes, 17, 64, 64)).transpose(0, 1).flatten(1)
    return Scale(*(torch.round(value, decimals=5) for value in (latents.mean(1), latents.std(1))))
