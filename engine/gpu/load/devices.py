"""The device that a process works on."""

import gc
import timeit
from collections.abc import Callable

import torch

from engine.job import EngineError


def choose_device(wanted: str) -> torch.device:
    """The device for `wanted`; `auto` takes the best that is there. Raises EngineError if it is missing."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    kind = wanted.partition(":")[0]
    if not available.get(kind, False):
        remedy = 'set device = "auto", or name others in devices'
        raise EngineError(f"device: '{wanted}' is not available on this machine; {remedy}", "no_device")
    return torch.device(kind)  # cuda:1 is the only card that the process sees, and so the first (`process.only_card`)


def shortest_s(work: Callable[[], object], device: torch.device) -> float:
    """The shortest time of three runs of some work on the device, after one that starts its libraries."""

    def whole_work() -> None:
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return min(timeit.repeat(whole_work, repeat=4, number=1)[1:])


def give_back(device: torch.device) -> None:
    """Return the memory that no tensor holds any more to the card."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
