"""A few processes that train one model: on a CPU, one thread in each of two processes beats two threads in one.

A step is always cut into the same number of shards and each shard has its own seed, so the number of ranks
changes the speed and not the result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing import spawn

SHARDS = 2


def launch(ranks: int, work: Callable[..., None], *arguments: object) -> None:
    """Run `work(*arguments)` in this process, or in `ranks` processes that find each other through a file."""
    if ranks == 1:
        work(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(_enter, (ranks, Path(folder) / "rendezvous", work, arguments), nprocs=ranks)


def _enter(rank: int, ranks: int, rendezvous: Path, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=ranks)
    work(*arguments)
    distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes the files and the log."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def own_shards() -> Iterable[int]:
    """The shards of a step that this process computes."""
    if not distributed.is_initialized():
        return range(SHARDS)
    return range(distributed.get_rank(), SHARDS, distributed.get_world_size())


def sum_gradients(params: list[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in one message."""
    if not distributed.is_initialized():
        return
    grads: list[Tensor] = [param.grad for param in params if param.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))
