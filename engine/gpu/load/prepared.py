"""The store of prepared weights, made from the installed ones once: a folder each in `models_dir/.prepared`.

Its name ends with a digest of what it was made from, so that weights that change get another entry, which replaces the
outdated one. The store can be deleted at any time.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.planning.machine import GIB

log = logging.getLogger("wangpd.worker")
STORE = ".prepared"
ROOM_BYTES = 2 * GIB  # that must stay free on the disk beside what is written
SHARD_BYTES = GIB // 2  # of a file: a copy in another dtype is made in RAM, a file at a time


def entry(models_dir: Path, what: str, sources: Iterable[Path], method: Any) -> Path:
    """The folder for `what`, whose name changes with the sources (name, size, time) and the method, any JSON."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    digest = hashlib.sha256(json.dumps([method, files]).encode()).hexdigest()[:12]
    return models_dir / STORE / f"{what}.{digest}"


def publish(folder: Path, size_bytes: int, write: Callable[[Path], None]) -> bool:
    """Let `write` fill the entry, and remove outdated ones of the same; False, and logged, if it can't be written."""
    try:
        with _alone(folder.parent):
            if folder.is_dir():  # another worker was faster
                return True
            free_bytes = shutil.disk_usage(folder.parent).free
            if free_bytes < size_bytes + ROOM_BYTES:
                raise OSError(f"it takes {size_bytes / GIB:.1f} GiB, and {free_bytes / GIB:.1f} GiB are free")
            part = folder.with_name(f"{folder.name}.part")
            try:
                part.mkdir()
                write(part)
                for path in filter(Path.is_file, part.rglob("*")):
                    with path.open("rb") as file:
                        os.fsync(file.fileno())  # the folder's name must not outlive its bytes
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)  # there only after a failure, as when the disk is full
            for other in folder.parent.iterdir():
                if other != folder and other.stem == folder.stem:
                    shutil.rmtree(other)
            return True
    except (OSError, SafetensorError) as error:
        log.warning("prepared weights %s are not kept: %s", folder.name, error)
        return False


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Within, no other process writes to the store; so what is unfinished there was left by one that died."""
    store.mkdir(parents=True, exist_ok=True)
    with (store / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for unfinished in store.glob("*.part"):
            shutil.rmtree(unfinished)
        yield
