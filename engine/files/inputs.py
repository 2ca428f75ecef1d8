"""The input files of the tasks, stored by content: the same file sent twice is stored once."""

import hashlib
import os
import time
from pathlib import Path

from engine.files.folders import stats
from engine.files.place import NoStorage
from engine.files.publish import published

SAFE_AGE_S = 3600  # a younger file may belong to a request that has no row yet


class Inputs:
    """A folder of files named by the SHA-256 of what they hold."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, data: bytes) -> Path:
        """Return the path of `data`, stored or not."""
        return self._folder / hashlib.sha256(data).hexdigest()

    def store(self, data: bytes) -> Path:
        """Store `data` and return its path. A file under its final name is always whole. Raises NoStorage."""
        path = self.path(data)
        try:
            if path.exists():
                os.utime(path)  # so that `sweep` keeps it for its new request
                return path
            self._folder.mkdir(parents=True, exist_ok=True)
            with published(path, rivals=True) as part:
                part.write_bytes(data)
        except OSError as error:
            raise NoStorage(
                f"state_path can't take the files that were sent ({error.strerror}); free its disk"
            ) from None
        return path

    def sweep(self, needed: set[str]) -> int:
        """Remove the files that no task needs any more, and return how many there were."""
        before = time.time() - SAFE_AGE_S
        stale = [name for name, about in stats(self._folder) if name not in needed and about.st_mtime < before]
        for name in stale:
            (self._folder / name).unlink(missing_ok=True)
        return len(stale)
