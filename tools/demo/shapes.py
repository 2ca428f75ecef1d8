"""Scenes to pixels: anti-aliased shapes that move at constant speed.

A clip is `background + mask * (colour - background)`, so one mask of a single channel describes it. The
latents are made from the mask alone, which is why training data costs next to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scene import BACKGROUNDS, COLORS, MOTIONS, RGB, SHAPES, Scene

REFERENCE_SIDE = 64
MARGIN = 1.1  # of a radius: half the width of the widest shape
SQUARE_HALF = 0.9
TRIANGLE_SLOPE = 0.55  # half base over height
LONGEST_TRAVEL = 0.9  # of the shorter side
SLOW_SPEED = 0.32  # pixels a frame, in a 64 pixel frame: three windows of 33 frames cross it
TOP_SPEED = 2.0  # pixels a frame, in a 64 pixel frame: a latent is 4 frames, and what crosses it in one is a blur


def radius(scene: Scene, height: int, width: int) -> float:
    """In pixels; shapes grow with the frame."""
    return scene.diameter / 2 * min(height, width) / REFERENCE_SIDE


def centres(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """The path of the shape's centre: (frames, 2) as x, y in pixels, wholly inside the frame."""
    margin = MARGIN * radius(scene, height, width) + 0.5
    room = torch.tensor([width - 2 * margin, height - 2 * margin])
    heading = torch.tensor(MOTIONS[scene.traits.motion], dtype=torch.float32)
    if scene.traits.slow:
        return margin + _slow_path(scene, frames, room, SLOW_SPEED * min(height, width) / REFERENCE_SIDE * heading)
    longest = min(LONGEST_TRAVEL, TOP_SPEED * (frames - 1) / REFERENCE_SIDE) * min(height, width)
    travel = (scene.reach * room).clamp(max=longest) * heading
    slack = room - travel.abs()
    along = torch.where(heading == 0, scene.across, scene.along)
    start = margin + slack * along - travel.clamp(max=0)
    if scene.traits.motion == "still":
        start = margin + room * torch.tensor([scene.along, scene.across])
    return start + torch.linspace(0, 1, frames)[:, None] * travel


def _slow_path(scene: Scene, frames: int, room: Tensor, speed: Tensor) -> Tensor:
    """At constant speed to the end of the room, and there it stays: (frames, 2) from the room's corner."""
    ahead = torch.where(speed < 0, 1 - scene.along, scene.along)
    start = room * torch.where(speed == 0, scene.across, ahead)
    return (start + torch.arange(frames)[:, None] * speed).clamp(min=0).minimum(room)


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (r + 0.5 - (x * x + y * y).sqrt()).clamp_(0, 1)


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    half = SQUARE_HALF * r + 0.5
    return (half - x.abs()).clamp_(0, 1) * (half - y.abs()).clamp_(0, 1)


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    across = (TRIANGLE_SLOPE * (y + r) - x.abs()) / (1 + TRIANGLE_SLOPE**2) ** 0.5
    return (across + 0.5).clamp_(0, 1) * (r + 0.5 - y).clamp_(0, 1)


PAINTERS = {"circle": _circle, "square": _square, "triangle": _triangle}


def cover(shape: str, path: Tensor, radii: Tensor, height: int, width: int) -> Tensor:
    """How much of each pixel the shape covers.

    path: (N, frames, 2) centres · radii: (N,) → (N, frames, height, width) float32 in [0, 1]
    """
    x = torch.arange(width) + 0.5 - path[..., None, None, 0]
    y = (torch.arange(height) + 0.5)[:, None] - path[..., None, None, 1]
    return PAINTERS[shape](x, y, radii[:, None, None, None])


def masks(scenes: list[Scene], frames: int, height: int, width: int) -> Tensor:
    """One mask a scene: (N, frames, height, width). Painted shape by shape, as a batch of one shape is one call."""
    out = torch.empty(len(scenes), frames, height, width)
    paths = torch.stack([centres(scene, frames, height, width) for scene in scenes])
    radii = torch.tensor([radius(scene, height, width) for scene in scenes])
    for shape in SHAPES:
        rows = [i for i, scene in enumerate(scenes) if scene.traits.shape == shape]
        if rows:
            out[rows] = cover(shape, paths[rows], radii[rows], height, width)
    return out


def _signed(colors: list[RGB]) -> Tensor:
    return torch.tensor(colors, dtype=torch.float32) / 127.5 - 1


def palette(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Shape and background colours, each (N, 3) in [-1, 1]."""
    shapes = _signed([COLORS[scene.traits.color] for scene in scenes])
    return shapes, _signed([BACKGROUNDS[scene.traits.background] for scene in scenes])


def paint(scenes: list[Scene], mask: Tensor) -> Tensor:
    """mask (N, F, H, W) → clips (N, 3, F, H, W) in [-1, 1]"""
    front, back = (color[:, :, None, None, None] for color in palette(scenes))
    return back + mask[:, None] * (front - back)


def render(scenes: list[Scene], frames: int, height: int, width: int) -> Tensor:
    """Clips as the VAE sees them: (N, 3, frames, height, width) in [-1, 1]."""
    return paint(scenes, masks(scenes, frames, height, width))


def as_uint8(clips: Tensor) -> Tensor:
    """(N, 3, F, H, W) in [-1, 1] → (N, F, H, W, 3) uint8, as a player shows them."""
    return ((clips.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
