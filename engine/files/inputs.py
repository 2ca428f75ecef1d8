"""The input files of the tasks, stored by content: the same file sent twice is stored once."""

import asyncio
import hashlib
import secrets
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from engine.files.folders import stats
from engine.files.place import Folder, NoStorage
from engine.files.publish import move


class Sent(NamedTuple):
    """A file that came with a request. It is in `path` until the request ends, unless it is stored."""

    path: Path
    sha256: str
    size_bytes: int
    seconds: float = 0.0  # of a video or a sound, once it has been examined


PART = ".sent-"  # how the name begins of a file of a request under way
Receive = Callable[[Iterable[bytes]], Sent]


class Inputs:
    """A folder of files named by the SHA-256 of what they hold. Any thread may call its methods, which block."""

    def __init__(self, folder: Path, disk: Folder, limit_bytes: int) -> None:
        """`disk` is the folder around it, as Place looks at it."""
        self._folder, self._disk, self._limit_bytes = folder, disk, limit_bytes
        self._size_bytes = 0  # counted by `open` and by each sweep
        self._held: Counter[str] = Counter()  # names that requests under way need
        self._lock = threading.Lock()

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[Receive]:
        """Yield what receives the files of one request, whose names no sweep removes within the block.

        It writes a file from chunks, and raises NoStorage. What is not stored by the end of the block is removed.
        """
        parts, names = list[Path](), Counter[str]()

        def receive(chunks: Iterable[bytes]) -> Sent:
            if fault := self._disk.fault():
                raise NoStorage(fault)
            parts.append(self._folder.with_name(f"{PART}{secrets.token_hex(8)}"))
            sent = _written(parts[-1], chunks)
            names[sent.sha256] += 1
            with self._lock:
                self._held[sent.sha256] += 1
            return sent

        def release() -> None:
            _remove(parts)
            with self._lock:
                self._held -= names

        try:
            yield receive
        finally:
            if parts:
                await asyncio.to_thread(release)

    def open(self) -> None:
        """Count the files, and remove what a daemon that was killed has left of requests. Call it before the first."""
        self._size_bytes = sum(about.st_size for _, about in stats(self._folder))
        _remove(self._folder.with_name(name) for name, _ in stats(self._folder.parent) if name.startswith(PART))

    def path(self, sent: Sent) -> Path:
        """Return where the file is once it is stored."""
        return self._folder / sent.sha256

    def store(self, sent: Sent) -> None:
        """Keep a file beyond its request; under its final name it is always whole. Raises NoStorage."""
        final = self.path(sent)
        if final.exists():
            return
        try:
            self._folder.mkdir(exist_ok=True)
            move(sent.path, final)
        except OSError as error:
            raise _no_room(error) from None
        with self._lock:
            self._size_bytes += sent.size_bytes

    def has_room(self, more: Iterable[Sent]) -> bool:
        """Whether these files, stored too, are within the limit."""
        new = {sent.sha256: sent.size_bytes for sent in more if not self.path(sent).exists()}
        return self._size_bytes + sum(new.values()) <= self._limit_bytes

    def sweep(self, needed: set[str]) -> int:
        """Remove the files that neither `needed` names nor a request under way has, and return how many."""
        removed = kept_bytes = 0
        for name, about in stats(self._folder):
            with self._lock:  # no request takes it up in between
                if name in needed or name in self._held:
                    kept_bytes += about.st_size
                else:
                    (self._folder / name).unlink(missing_ok=True)
                    removed += 1
        self._size_bytes = kept_bytes
        return removed


def _written(path: Path, chunks: Iterable[bytes]) -> Sent:
    """A new file that holds the chunks. Raises NoStorage, and what `chunks` raises."""
    digest = hashlib.sha256()
    try:
        with path.open("xb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            return Sent(path, digest.hexdigest(), file.tell())
    except OSError as error:
        raise _no_room(error) from None


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):  # the next start removes it
            path.unlink(missing_ok=True)


def _no_room(error: OSError) -> NoStorage:
    return NoStorage(f"state_path can't take the files that were sent ({error.strerror}); free its disk")
