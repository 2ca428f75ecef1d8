"""Carry out a memory plan: put a pipeline's parts where it says, and measure what plans are made from."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn
from transformers import PreTrainedModel

from engine.catalog.models import Model
from engine.gpu.load.devices import shortest_s
from engine.gpu.run import decoding
from engine.job import Job
from engine.planning.machine import Machine, free_ram_bytes
from engine.planning.placement import Plan, streamed_blocks
from engine.planning.work import Parts


def measure(device: torch.device) -> Machine:
    """What is free now, and how fast the device is; it is timed once in a process, for some tenths of a second."""
    speeds = _speeds(device)  # first: what it leaves on the card is not free
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return Machine(free_bytes, free_ram_bytes(), *speeds)


@cache
def _speeds(device: torch.device) -> tuple[float, float]:
    """Bytes a second from pinned RAM to the card, and operations a second of a large matrix product."""
    side, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    flops_per_s = 2 * side**3 / shortest_s(lambda: matrix @ matrix, device)
    if device.type != "cuda":
        return math.inf, flops_per_s  # nothing has to be copied
    source = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    return source.nbytes / shortest_s(lambda: source.to(device), device), flops_per_s


def parts_of(pipe: Any, model: Model) -> Parts:
    """The weights that the pipeline really holds, in the dtypes that they have."""
    steps, encoders, others = _by_role(pipe)
    return Parts(
        denoisers=sum(map(size_bytes, steps)),
        encoders=sum(map(size_bytes, encoders)),
        vae=sum(map(size_bytes, others)),
        denoiser_count=max(1, len(steps)),
        parameters=max(map(_parameters, steps), default=0),
        vae_width=decoding.width_of(pipe),
        changed=bool(model.recipe_loras),
    )


def size_bytes(module: nn.Module) -> int:
    """Bytes of the module's weights as they are stored."""
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        # One of torchao's reports the dtype that it widens to; what it stores are its parts.
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        total += sum(getattr(tensor, name).nbytes for name in names) or tensor.nbytes
    return total


def _parameters(module: nn.Module) -> int:
    """Numbers of the module's weights. Packed ones, several in a byte, are all of linear layers."""
    wide = sum(weight.numel() for weight in module.parameters() if weight.is_floating_point())
    linear = [(part, part._parameters.get("weight")) for part in module.modules() if isinstance(part, nn.Linear)]
    packed = [part for part, weight in linear if weight is None or not weight.is_floating_point()]
    return wide + sum(part.in_features * part.out_features for part in packed)


def is_denoiser(component: str) -> bool:
    """True for transformer, transformer_2, unconditional_transformer, unet …"""
    return "transformer" in component or "unet" in component


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Component → what runs at every step."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and is_denoiser(name)}


def _by_role(pipe: Any) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """The denoisers; what encodes prompts and pictures; and the others: the VAE, and small parts."""
    steps = list(denoisers(pipe).values())
    rest = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part not in steps]
    encoders = [part for part in rest if isinstance(part, PreTrainedModel)]  # none of transformers' does anything else
    return steps, encoders, [part for part in rest if part not in encoders]


def carry_out(pipe: Any, plan: Plan, device: torch.device) -> None:
    """Put the parts, which are in RAM, where `plan` says; copies are only hidden behind the arithmetic on CUDA."""
    where = plan.placement
    tile_vae(pipe, where.tile_side)
    if where.denoisers == "swapped":
        pipe.enable_model_cpu_offload(device=device)
        return
    steps, encoders, others = _by_role(pipe)
    share = plan.resident_bytes / max(1, plan.resident_bytes + plan.streamed_bytes)
    for part in others:
        if where.denoisers == "sequential":
            # Without a stream: a VAE in tiles takes its layers in another order than the one that was seen first.
            apply_group_offloading(part, device, offload_type="leaf_level")
        else:
            part.to(device)
    for denoiser in steps:
        if where.denoisers == "resident":
            denoiser.to(device)
        elif where.denoisers == "streamed":
            _stream_blocks(denoiser, round(share * size_bytes(denoiser)), device, where.pinned)
        else:
            apply_group_offloading(denoiser, **_streaming(device, where.pinned))
    for encoder in encoders:
        if where.encoders == "streamed":
            apply_group_offloading(encoder, **_streaming(device, where.encoders_pinned))
        else:
            encoder.to(device)


def _streaming(device: torch.device, pinned: bool, level: str = "leaf_level") -> dict[str, Any]:
    """Options of diffusers' group offload: it copies each layer, or block, to `device` when it is its turn."""
    # Without `record_stream`: with it, blocks that came early pile up on the card.
    stream = {"use_stream": device.type == "cuda", "low_cpu_mem_usage": not pinned}
    return {"onload_device": device, "offload_type": level, "num_blocks_per_group": 1, **stream}


def _stream_blocks(denoiser: Any, resident_bytes: int, device: torch.device, pinned: bool) -> None:
    """Keep `resident_bytes` of the denoiser on the device and stream the rest of its blocks."""
    blocks = [block for part in denoiser.children() if isinstance(part, nn.ModuleList) for block in part]
    sizes = [size_bytes(block) for block in blocks]
    places = streamed_blocks(sizes, resident_bytes - (size_bytes(denoiser) - sum(sizes)))
    streamed = {blocks[place] for place in places}
    with _showing(denoiser, set(blocks) - streamed):
        denoiser.to(device)
    if not streamed:
        return
    # Diffusers prefetches one block ahead: a U-Net's few are too large to have two of them on the card. From memory
    # that is not pinned, layers are quicker: it would copy twice.
    level = "block_level" if pinned and len(blocks) >= 8 else "leaf_level"
    with _showing(denoiser, streamed, alone=True):
        denoiser.enable_group_offload(**_streaming(device, pinned, level))  # ValueError for a class that fails with it


@contextmanager
def _showing(module: nn.Module, shown: Collection[nn.Module], alone: bool = False) -> Iterator[None]:
    """Within, `module` has only the blocks `shown`, so that they can be placed; `alone`, it has nothing else."""
    own = module._modules, module._parameters, module._buffers
    lists = {name: part for name, part in module.named_children() if isinstance(part, nn.ModuleList)}
    fewer = {name: nn.ModuleList(block for block in blocks if block in shown) for name, blocks in lists.items()}
    module._modules = {**({} if alone else own[0]), **fewer}
    if alone:
        # Diffusers prefetches only if a module has something of its own to move.
        module._parameters, module._buffers = {}, {"nothing": torch.empty(0)}
    try:
        yield
    finally:
        module._modules, module._parameters, module._buffers = own


def tile_vae(pipe: Any, side: int) -> None:
    """Let the VAE work on tiles of `side` pixels that overlap by a quarter, where it can; 0 means whole frames."""
    vae: Any = getattr(pipe, "vae", None)
    if not side or not hasattr(vae, "use_tiling"):
        return
    vae.enable_tiling()
    for edge in ("height", "width", "size"):
        latent, sample = (getattr(vae, f"tile_{kind}_min_{edge}", 0) for kind in ("latent", "sample"))
        shrunk = round(side * latent / sample) if latent and sample else latent
        # The stride too: a class's own may be longer than a small tile.
        for kind, size in (("sample_min", side), ("sample_stride", side * 3 // 4), ("latent_min", shrunk)):
            if hasattr(vae, f"tile_{kind}_{edge}"):  # not as arguments: half of the classes take none
                setattr(vae, f"tile_{kind}_{edge}", size)


def more_frugal(profile: float) -> float:
    """The next profile that needs less memory of the card."""
    return {0: 4, 1: 3, 2: 4, 3: 4}.get(int(profile), 5)


def advice(job: Job, model: Model, where: str, profile: float) -> str:
    """Advice for a job that fits with no profile: the same at half the pixels, or half the frames."""
    step = model.spatial_multiple
    width, height = (max(step, round(side * 0.7 / step) * step) for side in (job.width, job.height))
    frames = model.frames.nearest(job.frames // 2)
    return (
        f"Out of memory while {where}, also with profile {profile:g}. {job.width}x{job.height} with {job.frames} frames"
        f" is too much for this card: try {width}x{height}, or video_length {frames}"
        + (", or batch_size 1." if job.batch_size > 1 else ".")
    )
