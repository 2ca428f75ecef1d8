"""A cache of thumbnails on the disk, which the daemon reads and the workers fill too."""

import hashlib
import math
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from engine.files.folders import trim

PREVIEW_WIDTH: Final = 320  # of a thumbnail where the request names no width


def key_of(name: str, about: os.stat_result, width: int) -> str:
    """Return the key of a file's thumbnail, which changes with the file."""
    identity = ascii((name, about.st_mtime_ns, about.st_size, width))
    return hashlib.sha256(identity.encode()).hexdigest()


class ThumbnailCache:
    """JPEG files by key in a folder of their own, the oldest removed when they outgrow `limit_bytes`.

    A cache that can't be read or written only costs time: no method raises OSError.
    """

    def __init__(self, folder: Path, limit_bytes: int = 256 * 2**20) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._size_bytes = math.inf  # not counted yet
        self._counting = threading.Lock()

    def get(self, key: str) -> Path | None:
        """Return the file that was put under `key`, or None."""
        path = self._folder / f"{key}.jpg"
        try:
            return path if path.stat().st_size else None  # a power cut may leave a name without its bytes
        except OSError:
            return None

    def put(self, key: str, data: bytes) -> Path | None:
        """Keep `data` and return its file; None if the disk does not take it."""
        path, part = self._folder / f"{key}.jpg", self._folder / f".{key}.{threading.get_ident()}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            with self._counting:  # before it can be found: what is removed is older
                self._size_bytes += len(data)
                if self._size_bytes > self._limit_bytes:
                    self._size_bytes = trim(self._folder, self._limit_bytes, self._limit_bytes * 3 // 4)
            return part.replace(path)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            return None

    def put_poster(self, path: Path, jpeg: bytes) -> None:
        """Keep the thumbnail of a file that is whole, in the default width of a preview."""
        with suppress(OSError):
            self.put(key_of(path.name, path.lstat(), PREVIEW_WIDTH), jpeg)
