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
        self._size_bytes = 0  # counted by each sweep
        self._held: Counter[str] = Counter()  # names that requests under way need
        self._lock = threading.Lock()

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[Receive]:
        """Yield what receives the files of one request, whose names no sweep removes within the block.

        It writes a file from chunks, and raises NoStorage. What is not stored by the end of the block is removed.
        """
        held: list[str] = []

        def hold(name: str) -> str:
            with self._lock:
                self._held[name] += 1
            held.append(name)
            return name

        def receive(chunks: Iterable[bytes]) -> Sent:
            sent = self._write(self._folder.with_name(hold(f"{PART}{secrets.token_hex(8)}")), chunks)
            hold(sent.sha256)
            return sent

        try:
            yield receive
        finally:
            if held:
                await asyncio.to_thread(self._release, held)

    def _release(self, held: list[str]) -> None:
        for part in (name for name in held if name.startswith(PART)):
            with suppress(OSError):  # the next sweep removes it
                self._folder.with_name(part).unlink(missing_ok=True)
        with self._lock:
            self._held -= Counter(held)

    def _write(self, path: Path, chunks: Iterable[bytes]) -> Sent:
        if fault := self._disk.fault():
            raise NoStorage(fault)
        digest = hashlib.sha256()
        try:
            with path.open("xb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                return Sent(path, digest.hexdigest(), file.tell())
        except OSError as error:
            raise _no_room(error) from None

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
        parts = [self._folder.with_name(name) for name, _ in stats(self._folder.parent) if name.startswith(PART)]
        stored = {self._folder / name: about.st_size for name, about in stats(self._folder)}
        removed = 0
        for path in (*parts, *stored):
            with self._lock:  # no request takes it up in between
                if path.name not in needed and path.name not in self._held:
                    path.unlink(missing_ok=True)
                    removed += 1
                    stored.pop(path, None)
        self._size_bytes = sum(stored.values())
        return removed


def _no_room(error: OSError) -> NoStorage:
    return NoStorage(f"state_path can't take the files that were sent ({error.strerror}); free its disk")
