"""Clips from the model, made the way the daemon makes them: through the pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from numpy.typing import NDArray
from PIL import Image

Frames = NDArray[np.uint8]  # (F, H, W, 3)
TOGETHER = 6  # clips in one call


@dataclass(frozen=True)
class Settings:
    """How a clip is made; the defaults are those that the model is shipped with."""

    frames: int = 17
    height: int = 64
    width: int = 64
    steps: int = 20
    guidance: float = 2.5


class Request(NamedTuple):
    """What one clip is asked to be."""

    prompt: str
    seed: int
    negative: str = ""
    image: Image.Image | None = None


class Sampler:
    """Both pipelines over one set of weights."""

    def __init__(self, folder: Path) -> None:
        self.text = WanPipeline.from_pretrained(folder, local_files_only=True)
        self.image = WanImageToVideoPipeline(**self.text.components, expand_timesteps=True)
        for pipeline in (self.text, self.image):
            pipeline.set_progress_bar_config(disable=True)

    def clips(self, requests: Iterable[Request], settings: Settings = Settings()) -> Iterator[Frames]:
        """One clip a request, in their order. A clip depends on its own seed only, not on its neighbours."""
        requests = list(requests)
        for first in range(0, len(requests), TOGETHER):
            yield from self._make(requests[first : first + TOGETHER], settings)

    def _make(self, group: list[Request], settings: Settings) -> Frames:
        options = {
            "prompt": [request.prompt for request in group],
            "negative_prompt": [request.negative for request in group],
            "generator": [torch.Generator().manual_seed(request.seed) for request in group],
            "num_frames": settings.frames,
            "height": settings.height,
            "width": settings.width,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            "max_sequence_length": 64,
            "output_type": "np",
        }
        if group[0].image is None:
            video = self.text(**options).frames
        else:
            video = np.concatenate([self._animate(request, options) for request in group])
        return (np.asarray(video) * 255).round().astype(np.uint8)

    def _animate(self, request: Request, options: dict[str, object]) -> NDArray[np.float32]:
        """Pictures go one by one: the pipeline takes a single one."""
        single = {"prompt": request.prompt, "negative_prompt": request.negative}
        generator = torch.Generator().manual_seed(request.seed)
        return self.image(image=request.image, **{**options, **single, "generator": generator}).frames
