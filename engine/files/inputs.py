"""The input pictures of the tasks, stored by content: a picture sent twice is stored once."""

import hashlib
import os
import time
from pathlib import Path

SAFE_AGE_S = 3600  # a file this young may belong to a request that has no row yet


class Inputs:
    """A folder of files named by the SHA-256 of what they hold."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, data: bytes) -> Path:
        """The file that holds `data`, or will once it is stored."""
        return self._folder / hashlib.sha256(data).hexdigest()

    def store(self, data: bytes) -> Path:
        """Keep `data` and return its file, which is whole at any moment."""
        path = self.path(data)
        if path.exists():
            os.utime(path)  # young again, so that `sweep` leaves it to its new request
            return path
        self._folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        return path

    def sweep(self, needed: set[str]) -> int:
        """Remove the files that no task needs any more, and return how many went."""
        if not self._folder.is_dir():
            return 0
        before = time.time() - SAFE_AGE_S
        stale = [path for path in self._folder.iterdir() if path.name not in needed and path.stat().st_mtime < before]
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)
