"""Look at processes from outside, through /proc."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.daemon import Daemon


def alive(pid: int) -> bool:
    """True while the process runs; a zombie does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def children(pid: int) -> set[int]:
    """The pids of its live children, of all its threads."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found.update(map(int, (task / "children").read_text().split()))
    return {child for child in found if alive(child)}


def command(pid: int) -> str:
    """Its command line; empty once it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def workers(daemon: Daemon) -> set[int]:
    """The generation processes of a daemon."""
    return {pid for pid in children(daemon.process.pid) if "spawn_main" in command(pid)}


def maps(pid: int) -> str:
    """What is mapped into its memory."""
    return Path(f"/proc/{pid}/maps").read_text()


def eventually(test: Callable[[], bool], timeout_s: float = 20) -> bool:
    """True as soon as `test` is; False if it has not become so in time."""
    deadline = time.monotonic() + timeout_s
    while not test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
