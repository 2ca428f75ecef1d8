"""The device that a process works on."""

import gc
import timeit
from collections.abc import Callable
from pathlib import Path

import torch

from engine.job import EngineError

CARDS = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"  # vendor and class of a card, as the kernel writes them


def choose_device(wanted: str) -> torch.device:
    """The device for `wanted`; `auto` is the CPU only where there is no card, broken or not. Raises EngineError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        if torch.version.cuda and not available["cuda"] and (card := broken_card()):
            sentence = f"device: the NVIDIA card {card} does not work with this driver; see nvidia-smi"
            raise EngineError(f'{sentence}, or set device = "cpu"', "no_device")
        return torch.device(next(name for name, there in available.items() if there))
    kind = wanted.partition(":")[0]
    if not available.get(kind, False):
        remedy = 'set device = "auto", or name others in devices'
        raise EngineError(f"device: '{wanted}' is not available on this machine; {remedy}", "no_device")
    return torch.device(kind)  # cuda:1 is the only card that the process sees, and so the first (`process.only_card`)


def broken_card(cards: Path = CARDS) -> str:
    """The PCI address of an NVIDIA card that no other driver has, such as nouveau; "" without one."""
    for card in sorted(cards.glob("*")):
        about = [(card / name).read_text() if (card / name).is_file() else "" for name in ("vendor", "class")]
        driver = (card / "driver").resolve().name
        if about[0].strip() == NVIDIA and about[1].startswith(DISPLAY) and driver in ("driver", "nvidia"):
            return card.name
    return ""


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
