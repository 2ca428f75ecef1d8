"""The machine: how much memory is free on it, and how fast it is."""

from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What was measured."""

    free_vram_bytes: int  # 0: there is no card, everything runs in RAM, in float32
    free_ram_bytes: int
    link_bytes_per_s: float = 12e9  # from RAM to the card
    flops_per_s: float = 50e12  # dense, in bf16
    cards: int = 1  # so many of them compute each forward of a denoiser together


def free_ram_bytes() -> int:
    """RAM that this process may fill, including what it holds already; what its cgroup allows, if that is less."""
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    own = _kilobytes("/proc/self/status", "RssAnon")
    return min(free + own, _cgroup_bytes())


def _kilobytes(path: str, name: str) -> int:
    """The entry `name` of a file of /proc, in bytes; 0 without one."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words and words[0] == f"{name}:"), 0)


def _cgroup_bytes(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """The smallest memory.max of the cgroup (version 2) and its parents; a very large number without one."""
    own = next((line[3:].strip("/") for line in membership.read_text().splitlines() if line.startswith("0::")), "")
    folders = [root / own, *(root / own).parents]
    limits = [path.read_text().strip() for folder in folders if (path := folder / "memory.max").is_file()]
    return min((int(limit) for limit in limits if limit != "max"), default=2**62)
