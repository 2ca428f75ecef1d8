"""Where the weights live while a pipeline runs."""

import inspect
import logging
from typing import Any

import torch

from engine.catalog import Model
from engine.job import Job

log = logging.getLogger("wangpd.worker")
HEADROOM = 0.75  # share of the free GPU memory that weights may take; activations need the rest

# vae_config → side of a VAE tile in pixels; 0 is chosen by the card's memory, smallest first.
TILES = {1: 512, 2: 256, 3: 128}
SMALLEST_TILE = min(TILES.values())
AUTO_TILES = ((8 * 2**30, 128), (16 * 2**30, 256), (24 * 2**30, 512))


def place(pipe: Any, model: Model, device: torch.device, profile: float, vae_config: int) -> None:
    """Put the pipeline where it is to run: on the device whole, or streamed in as `profile` or free memory demands."""
    if device.type != "cuda":
        pipe.to(device)
        return
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    profile = profile or choose_profile(model, free_bytes)
    log.info("model %s: profile %g, %.1f GiB of GPU memory free", model.id, profile, free_bytes / 2**30)
    _PLACINGS[int(profile)](pipe, device)
    tile_vae(pipe, TILES.get(vae_config) or auto_tile(total_bytes))


def choose_profile(model: Model, free_bytes: int) -> int:
    """The fastest profile whose weights fit `free_bytes` of GPU memory with room for activations."""
    room = free_bytes * HEADROOM
    if model.total_bf16_bytes <= room:
        return 1
    largest = max(model.transformer_bf16_bytes // model.transformer_count, model.encoders_bf16_bytes)
    return 3 if largest <= room else 4


def auto_tile(total_bytes: int) -> int:
    """The side of a VAE tile for a card of this size; 0 means whole frames."""
    return next((side for limit, side in AUTO_TILES if total_bytes < limit), 0)


def tile_vae(pipe: Any, side: int) -> None:
    """Let the VAE work on tiles of `side` pixels that overlap by a quarter, where it can; 0 means whole frames.

    The stride is set too: a class's own may be longer than a small tile.
    """
    vae: Any = getattr(pipe, "vae", None)
    if not side or not hasattr(vae, "enable_tiling"):
        return
    sizes = {f"tile_sample_min_{edge}": side for edge in ("height", "width")}
    sizes |= {f"tile_sample_stride_{edge}": side * 3 // 4 for edge in ("height", "width")}
    known = inspect.signature(vae.enable_tiling).parameters
    vae.enable_tiling(**{name: value for name, value in sizes.items() if name in known})


def _resident(pipe: Any, device: torch.device) -> None:
    pipe.to(device)


def _by_component(pipe: Any, device: torch.device) -> None:
    pipe.enable_model_cpu_offload(device=device)


def _by_block(pipe: Any, device: torch.device) -> None:
    pipe.enable_group_offload(
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        exclude_modules=["vae"],
    )
    pipe.vae.to(device)


def _by_layer(pipe: Any, device: torch.device) -> None:
    pipe.enable_sequential_cpu_offload(device=device)


_PLACINGS = {1: _resident, 2: _by_block, 3: _by_component, 4: _by_block, 5: _by_layer}


def more_frugal(profile: float) -> float:
    """The next profile that needs less memory of the card."""
    return {0: 4, 1: 3, 2: 4, 3: 4}.get(int(profile), 5)


def advice(job: Job, model: Model, where: str, profile: float) -> str:
    """What to tell a user whose job fits with no profile: the same job at half the pixels, or half the frames."""
    step = model.spatial_multiple
    width, height = (max(step, round(side * 0.7 / step) * step) for side in (job.width, job.height))
    frames = model.frames.nearest(job.frames // 2)
    return (
        f"Out of memory while {where}, also with profile {profile:g}. {job.width}x{job.height} with {job.frames} frames"
        f" is too much for this card: try {width}x{height}, or video_length {frames}"
        + (", or batch_size 1." if job.batch_size > 1 else ".")
    )
