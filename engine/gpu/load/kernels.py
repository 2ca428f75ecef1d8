"""Which attention kernel the denoisers run with: the configured one, or the fastest of those that work here."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

from engine.capabilities import AUTO, KERNELS, SHAREABLE_KERNELS
from engine.gpu.load.devices import shortest_s
from engine.job import EngineError

log = logging.getLogger("wangpd.worker")
NATIVE = "native"
MOST_TOKENS = 32_768  # a longer sequence is not measured at its length: the order of the kernels does not change
# The others are taken by name only: nobody asked `auto` for other pictures.
EXACT = tuple(name for name, kernel in KERNELS.items() if kernel.exact)


def set_kernel(pipe: Any, mode: str, device: torch.device, tokens: int, *, together: bool = False) -> str:
    """Let the denoisers run with the kernel of `mode`, or the fastest at `tokens`; its name. Raises EngineError."""
    parts = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    sized = {part: size for part in parts if hasattr(part, "set_attention_backend") and (size := _heads(part))}
    if not sized or device.type != "cuda":
        return "sdpa"  # diffusers' own default
    names = tuple(name for name in EXACT if not together or name in SHAREABLE_KERNELS)
    length = min(MOST_TOKENS, 1 << max(8, tokens.bit_length() - 1))
    name = mode if mode != AUTO else _measured(*next(iter(sized.values())), length, device, names)
    for part in sized:
        try:
            set_backend(part, KERNELS[name].backend)
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"attention_mode '{name}' does not work here: {error}", "no_attention") from None
    return name


def set_backend(denoiser: Any, backend: str) -> None:
    """Let this denoiser alone run with a backend; diffusers by itself would make it the default of all models too."""
    with attention_backend(NATIVE):
        denoiser.set_attention_backend(backend)


def _heads(denoiser: Any) -> tuple[int, int] | None:
    count, width = map(denoiser.config.get, ("num_attention_heads", "attention_head_dim"))
    return (count, width) if isinstance(count, int) and isinstance(width, int) else None


@cache
def _measured(count: int, width: int, length: int, device: torch.device, names: tuple[str, ...]) -> str:
    query = torch.randn(1, length, count, width, device=device, dtype=torch.bfloat16)
    name = fastest(query, seconds, names)
    log.debug("attention: %s is the fastest of those here, at %d tokens", name, length)
    return name


def fastest(query: torch.Tensor, clock: Callable[[str, torch.Tensor], float], names: tuple[str, ...] = EXACT) -> str:
    """Which of the kernels `clock` finds fastest; those that fail are left out. query: (1, tokens, heads, width)"""
    times: dict[str, float] = {}
    for name in names:
        try:
            if KERNELS[name].installed:
                times[name] = clock(KERNELS[name].backend, query)
        except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
            log.debug("attention: %s does not run here: %s", name, error)
    return min(times, key=times.__getitem__, default="sdpa")


@torch.no_grad()
def seconds(backend: str, query: torch.Tensor) -> float:
    """The shortest time of some calls of a kernel."""
    return shortest_s(lambda: dispatch_attention_fn(query, query, query, backend=backend), query.device)
