"""What is to be seen in a clip: colour, shape, direction and background, read from pixels alone.

No learnt parts: the background is what the border shows, the object is what differs from it, and the shape is the
one whose drawing of the same area in the same place covers the object best. `measure_demo.py` tries it on drawn clips
first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .scene import BACKGROUNDS, COLORS, RGB, SHAPES
from .shapes import REFERENCE_SIDE, SQUARE_HALF, TRIANGLE_SLOPE, cover

NOTHING = "none"
BORDER = 2  # pixels
FAINTEST = 60.0  # of 442: less than this from the background is no object
SOLID = 0.5  # of the object's own contrast
STILL_SHARE = 0.05  # of the shorter side: less travel than this is standing still
LOOKS = 6  # frames whose shape is compared

# area = factor * radius², and how far the centroid is below the middle, in radii
_AREAS = {"circle": np.pi, "square": 4 * SQUARE_HALF**2, "triangle": 4 * TRIANGLE_SLOPE}
_DROPS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}


@dataclass(frozen=True)
class Reading:
    """What a clip shows. Without an object the names are `none`.

    `diameter` is in pixels of a 64 pixel frame · `fit` is how well the shape's drawing covers the object, 0 to 1 ·
    `stray` is the share of solid pixels outside of the one object · `jitter` is how far, in pixels, the object strays
    from constant speed.
    """

    color: str
    shape: str
    direction: str
    background: str
    diameter: float = 0.0
    fit: float = 0.0
    stray: float = 0.0
    jitter: float = 0.0


def nearest(rgb: Tensor, names: dict[str, RGB]) -> str:
    """The name of the closest colour."""
    return min(names, key=lambda name: float((rgb - torch.tensor(names[name])).norm()))


def _border_color(video: Tensor) -> Tensor:
    """The median colour of the frame's edge, (3,); a shape that touches it is outvoted."""
    ring = torch.ones(video.shape[1:3], dtype=torch.bool)
    ring[BORDER:-BORDER, BORDER:-BORDER] = False
    return video[:, ring].flatten(0, 1).median(dim=0).values


def _largest_parts(solid: Tensor) -> Tensor:
    """Of each frame's solid pixels, the largest connected part: (F, H, W) bool → (F, H, W) bool"""
    frames, height, width = solid.shape
    labels = torch.arange(1.0, height * width + 1).view(1, height, width) * solid
    while True:
        spread = functional.max_pool2d(labels, 3, stride=1, padding=1) * solid
        if torch.equal(spread, labels):
            break
        labels = spread
    counts = torch.zeros(frames, height * width + 1)
    counts.scatter_add_(1, labels.flatten(1).long(), solid.flatten(1).float())
    return solid & (labels == counts.argmax(dim=1).view(-1, 1, 1))


def _centroids(weight: Tensor) -> Tensor:
    """(F, H, W) → (F, 2) as x, y"""
    mass = weight.sum((1, 2))
    x = (weight.sum(1) * (torch.arange(weight.shape[2]) + 0.5)).sum(1) / mass
    y = (weight.sum(2) * (torch.arange(weight.shape[1]) + 0.5)).sum(1) / mass
    return torch.stack([x, y], dim=1)


def _line(times: Tensor, places: Tensor) -> tuple[Tensor, float]:
    """Least squares: the travel from the first to the last frame, (2,), and the mean distance from the line."""
    if len(times) < 2:
        return torch.zeros(2), 0.0
    centered = times - times.mean()
    speed = (centered[:, None] * (places - places.mean(0))).sum(0) / centered.square().sum()
    distance = (places - places.mean(0) - centered[:, None] * speed).norm(dim=1).mean()
    return speed * (times[-1] - times[0]), float(distance)


def name_direction(travel: Tensor, side: int) -> str:
    """right, left, up, down or still."""
    x, y = travel.tolist()
    if max(abs(x), abs(y)) < STILL_SHARE * side:
        return "still"
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _fits(weight: Tensor, places: Tensor) -> dict[str, float]:
    """How well each shape of the object's own area and place covers it: the mean overlap over union."""
    areas = weight.sum((1, 2))
    fits = {}
    for shape in SHAPES:
        radii = (areas / _AREAS[shape]).sqrt()
        middles = places - torch.stack([torch.zeros_like(radii), _DROPS[shape] * radii], dim=1)
        drawn = cover(shape, middles[:, None], radii, *weight.shape[1:])[:, 0]
        overlap = torch.minimum(drawn, weight).sum((1, 2)) / torch.maximum(drawn, weight).sum((1, 2))
        fits[shape] = float(overlap.mean())
    return fits


def read_clip(frames: NDArray[np.uint8]) -> Reading:
    """Judge a clip of (F, H, W, 3) uint8 frames."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).float()
    border = _border_color(video)
    ground = nearest(border, BACKGROUNDS)
    contrast = (video - border).norm(dim=-1)
    visible = contrast[contrast > FAINTEST]
    if visible.numel() == 0:
        return Reading(NOTHING, NOTHING, NOTHING, ground)
    strength = contrast / visible.quantile(0.75)
    return _read_object(video, strength, ground)


def _read_object(video: Tensor, strength: Tensor, ground: str) -> Reading:
    """strength: (F, H, W), 0 for the background and about 1 for the object"""
    solid = strength > SOLID
    part = _largest_parts(solid)
    present = part.flatten(1).any(dim=1)
    near = functional.max_pool2d(part.float(), 3, stride=1, padding=1)
    weight = (strength.clamp(0, 1) * near)[present]
    places = _centroids(weight)
    side = min(video.shape[1:3])
    travel, jitter = _line(present.nonzero()[:, 0].float(), places)
    looks = torch.linspace(0, len(weight) - 1, min(LOOKS, len(weight))).long()
    fits = _fits(weight[looks], places[looks])
    shape = max(fits, key=fits.__getitem__)
    color = video[part & (strength > 0.8)].median(dim=0).values if (part & (strength > 0.8)).any() else video[part][0]
    return Reading(
        color=nearest(color, {name: rgb for name, rgb in COLORS.items() if name != ground}),
        shape=shape,
        direction=name_direction(travel, side),
        background=ground,
        diameter=float(2 * (weight.sum((1, 2)).median() / _AREAS[shape]).sqrt() * REFERENCE_SIDE / side),
        fit=fits[shape],
        stray=1 - float(part.sum() / solid.sum()),
        jitter=jitter,
    )
