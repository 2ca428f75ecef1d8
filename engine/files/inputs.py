"""The input files of the tasks, stored by content: the same file sent twice is stored once."""

import hashlib
import time
from pathlib import Path

from engine.files.folders import stats
from engine.files.place import NoStorage
from engine.files.publish import published

SAFE_S = 3600  # in which a stored file may belong to a request that has no row yet


class Inputs:
    """A folder of files named by the SHA-256 of what they hold."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored: dict[str, float] = {}  # name → time.monotonic(), which no step of the wall clock moves

    def path(self, data: bytes) -> Path:
        """Return the path of `data`, stored or not."""
        return self._folder / hashlib.sha256(data).hexdigest()

    def store(self, data: bytes) -> Path:
        """Store `data` and return its path. A file under its final name is always whole. Raises NoStorage."""
        path = self.path(data)
        self._stored[path.name] = time.monotonic()  # first: `sweep` keeps it for its new request
        try:
            if path.exists():
                return path
            self._folder.mkdir(exist_ok=True)
            with published(path, rivals=True) as part:
                part.write_bytes(data)
        except OSError as error:
            raise NoStorage(
                f"state_path can't take the files that were sent ({error.strerror}); free its disk"
            ) from None
        return path

    def sweep(self, needed: set[str]) -> int:
        """Remove the files that no task needs any more, and return how many there were."""
        now, removed = time.monotonic(), 0
        for name in [name for name, at in list(self._stored.items()) if now - at > SAFE_S]:
            del self._stored[name]
        for name, _ in stats(self._folder):
            if name not in needed and name not in self._stored:
                (self._folder / name).unlink(missing_ok=True)
                removed += 1
        return removed
