"""A cache of thumbnails on the disk, which the daemon reads and the workers fill too."""

import hashlib
import math
import os
import shutil
import threading
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Final

from engine.files.folders import open_regular, stats
from engine.files.publish import published

LEAST_FREE_BYTES = 32 * 2**20  # the disk is the queue's first, see LEAST_STATE_MB
PREVIEW_WIDTH: Final = 320  # of a thumbnail where the request names no width


def key_of(name: str, about: os.stat_result, width: int) -> str:
    """Return the key of a file's thumbnail, which changes with the file."""
    identity = ascii((name, about.st_mtime_ns, about.st_size, width))
    return hashlib.sha256(identity.encode()).hexdigest()


class ThumbnailCache:
    """JPEG files by key, the oldest removed when they outgrow `limit_bytes`. A fault of the disk only costs time."""

    def __init__(self, folder: Path, limit_bytes: int = 256 * 2**20) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._size_bytes = math.inf  # not counted yet
        self._counting = threading.Lock()

    def get(self, key: str) -> BufferedReader | None:
        """Open the file that was put under `key`; None if there is none."""
        with suppress(OSError):
            file = open_regular(self._folder / f"{key}.jpg")
            if os.fstat(file.fileno()).st_size:
                return file
            file.close()  # a power cut may leave a name without its bytes
        return None

    def put(self, key: str, data: bytes) -> None:
        """Keep `data`, if the disk takes it."""
        path = self._folder / f"{key}.jpg"
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            if shutil.disk_usage(self._folder).free < LEAST_FREE_BYTES:
                return None
            with published(path, rivals=True, durable=False) as part:
                part.write_bytes(data)
                with self._counting:  # before it can be found: what is removed is older
                    self._size_bytes += len(data)
                    if self._size_bytes > self._limit_bytes:
                        self._trim()

    def _trim(self) -> None:
        """Count the files, and above the limit remove the oldest until a quarter of it is free."""
        files = sorted(stats(self._folder), key=lambda file: -file[1].st_mtime_ns)
        self._size_bytes = sum(about.st_size for _, about in files)
        goal_bytes = self._limit_bytes * 3 // 4 if self._size_bytes > self._limit_bytes else math.inf
        while self._size_bytes > goal_bytes:
            name, about = files.pop()
            (self._folder / name).unlink(missing_ok=True)
            self._size_bytes -= about.st_size
