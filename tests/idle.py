"""A daemon that takes work and starts none, so that hundreds of accepted requests cost nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.daemon import Daemon


@contextmanager
def idle_daemon(folder: Path, **config: Any) -> Iterator[Daemon]:
    """A running daemon whose queue is empty and paused."""
    with Daemon(folder, **config) as daemon:
        assert daemon.post("/queue/pause").status_code == 200
        yield daemon
