"""What a pipeline returns, as clips: from any of its fields, as tensors, arrays or pictures."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.catalog.models import Pipeline

PICTURES = ("frames", "images", "image", "video")
SOUND = ("audios", "audio", "sound")


@dataclass(frozen=True)
class Clip:
    """One finished file's content. `layer` counts the files that share a seed, from 0.

    frames: pieces of (F, H, W, 3 or 4) uint8 on the CPU, which may be made only as they are iterated over, or None;
    sound: (channels, N) float32 in -1..1 on the CPU, or None, at `sample_rate` samples a second.
    """

    seed: int
    frames: Iterable[torch.Tensor] | None = None
    sound: torch.Tensor | None = None
    sample_rate: int = 0
    layer: int = 0


def clips(output: Any, pipeline: Pipeline, seeds: Sequence[int], sample_rate: int, most_frames: int) -> Iterator[Clip]:
    """The clips of one call, in the order of their seeds. A class that makes more than `most_frames` is cut."""
    videos, sounds = _field(output, PICTURES, pipeline), _field(output, SOUND, pipeline)
    for i, seed in enumerate(seeds):
        sound = None if sounds is None else torch.as_tensor(sounds[i]).float().cpu().clamp(-1, 1)
        sound = sound[None] if sound is not None and sound.ndim == 1 else sound
        if videos is None:
            yield Clip(seed, None, sound, sample_rate)
            continue
        layered = isinstance(videos[i], list) and getattr(videos[i][0], "mode", "") == "RGBA"
        for layer, video in enumerate(videos[i] if layered else [videos[i]]):
            frames = pixels(video)
            kept = frames[-most_frames:] if pipeline.keeps_end else frames[:most_frames]
            yield Clip(seed, [kept], sound, sample_rate, layer)


def _field(output: Any, names: Sequence[str], pipeline: Pipeline) -> Any:
    """The first of these fields that the output has, one item a seed; else None."""
    found = next((output[name] for name in names if name in output and output[name] is not None), None)
    return [found] if pipeline.single and found is not None else found


def pixels(item: Any) -> torch.Tensor:
    """A video or a picture in any of the forms that classes return → (F, H, W, C) uint8 on the CPU.

    A tensor is (F, C, H, W) or (C, H, W), an array (F, H, W, C) or (H, W, C), both in 0..1; else pictures of Pillow.
    """
    if isinstance(item, list):
        return torch.cat([pixels(each) for each in item])
    if isinstance(item, Image.Image):
        return torch.from_numpy(np.array(item))[None]
    video = torch.as_tensor(item)
    levels = (video if video.ndim == 4 else video[None]).clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels if isinstance(item, np.ndarray) else levels.permute(0, 2, 3, 1).contiguous().cpu()
