"""The bodies of requests while they arrive: small ones in memory, all others in unnamed files on the state disk."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Final

from engine.files.place import Folder, NoStorage

SMALL_BYTES: Final = 64 * 2**10  # a body up to this size stays in memory and is not counted
BUSY = "The bodies that are arriving take all the room there is for them (4 x max_body_mb); send it again later"


class Spool:
    """All bodies under way. No client holds more than half of `limit_bytes`, so that no one client keeps others out."""

    def __init__(self, folder: Path, disk: Folder, limit_bytes: int) -> None:
        """`disk` is the folder as Place looks at it, or one that it is in."""
        self._folder, self._disk, self._limit_bytes = folder, disk, limit_bytes
        self._held: Counter[str] = Counter()  # bytes by client
        self._thread = ThreadPoolExecutor(1, "spool")  # a slow disk takes no thread that others need

    @asynccontextmanager
    async def body(self, client: str) -> AsyncIterator["Arrived"]:
        """Yield an empty body. Its room is free again after the block."""
        # Unnamed, so that nothing of it is left however the daemon ends.
        with SpooledTemporaryFile(SMALL_BYTES, dir=str(self._folder)) as file:
            body = Arrived(self, client, file)
            try:
                yield body
            finally:
                self._held[client] -= body.counted_bytes
                self._held += Counter()  # drops those that hold nothing

    def take(self, client: str, size_bytes: int) -> None:
        """Count `size_bytes` more for this client. Raises NoStorage where there is no room for them."""
        share = self._held[client] + size_bytes
        if share > self._limit_bytes / 2 or self._held.total() + size_bytes > self._limit_bytes:
            raise NoStorage(BUSY)
        self._held[client] = share

    async def write(self, file: "SpooledTemporaryFile[bytes]", data: bytes) -> None:
        """Append `data` to a file on the disk. Raises NoStorage if the disk can't take it."""

        def write() -> None:
            if fault := self._disk.fault():
                raise NoStorage(fault)
            file.write(data)

        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, write)
        except OSError as error:
            reason = f"state_path can't take the body ({error.strerror}); free its disk"
            raise NoStorage(reason) from None


class Arrived:
    """One body, as far as it has arrived."""

    def __init__(self, spool: Spool, client: str, file: "SpooledTemporaryFile[bytes]") -> None:
        self._spool, self._client, self.file = spool, client, file
        self.size_bytes = self.counted_bytes = 0

    async def add(self, data: bytes) -> None:
        """Append `data`. Raises NoStorage."""
        self.size_bytes += len(data)
        if self.size_bytes > SMALL_BYTES:
            more = self.size_bytes - self.counted_bytes
            self._spool.take(self._client, more)
            self.counted_bytes += more
            await self._spool.write(self.file, data)
        else:
            self.file.write(data)
