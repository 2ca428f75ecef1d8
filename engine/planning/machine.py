"""The machine: how much memory is free on it, and how fast it is."""

import re
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
    usable = _kilobytes("/proc/meminfo", "MemAvailable") + _kilobytes("/proc/self/status", "RssAnon")
    return min(usable, _cgroup_bytes())


def _kilobytes(path: str, name: str) -> int:
    """The entry `name` of a file of /proc, in bytes; 0 without one."""
    found = re.search(rf"^{name}:\s*(\d+)", Path(path).read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _cgroup_bytes(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """The smallest memory.max of the cgroup (version 2) and its parents; a very large number without one."""
    own = next((line[3:].strip("/") for line in membership.read_text().splitlines() if line.startswith("0::")), "")
    files = [folder / "memory.max" for folder in (root / own, *(root / own).parents)]
    limits = [path.read_text().strip() for path in files if path.is_file()]
    return min((int(limit) for limit in limits if limit != "max"), default=2**62)
