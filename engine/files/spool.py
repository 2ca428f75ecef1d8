"""The bodies of requests while they arrive: small ones in memory, all others in unnamed files on the state disk."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Final

from engine.files.place import Folder, NoStorage

SMALL_BYTES: Final = 64 * 2**10  # a body up to this size stays in memory and is not counted
BUSY = "The bodies that are arriving take all the room there is for them (4 x max_body_mb); send it again later"
BodyFile = SpooledTemporaryFile[bytes]


class Spool:
    """All bodies under way. No client holds more than half of `limit_bytes`, so that no one client keeps others out."""

    def __init__(self, folder: Path, disk: Folder, limit_bytes: int) -> None:
        """`disk` is the folder as Place looks at it, or one that it is in."""
        self._folder, self._disk, self._limit_bytes = folder, disk, limit_bytes
        self._held: Counter[str] = Counter()  # bytes by client
        self._thread = ThreadPoolExecutor(1, "spool")  # a slow disk takes no thread that others need

    @asynccontextmanager
    async def body(self, client: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[BodyFile]:
        """Yield a file with all `chunks`, at its end. Its room is free again after the block. Raises NoStorage."""
        # Unnamed, so that nothing of it is left however the daemon ends.
        file, counted_bytes = SpooledTemporaryFile[bytes](SMALL_BYTES, dir=str(self._folder)), 0
        loop = asyncio.get_running_loop()
        try:
            async for data in chunks:
                size_bytes = (counted_bytes or file.tell()) + len(data)
                if size_bytes <= SMALL_BYTES:
                    file.write(data)
                    continue
                self._take(client, size_bytes - counted_bytes)
                counted_bytes = size_bytes
                await loop.run_in_executor(self._thread, self._write, file, data)
            yield file
        finally:
            if not counted_bytes:
                file.close()
            else:  # in the thread: it lets go of the room on the disk, after a write that is under way
                with suppress(OSError):  # its last bytes can't be written
                    await asyncio.shield(loop.run_in_executor(self._thread, file.close))
                self._held.subtract({client: counted_bytes})
                self._held += Counter()  # drops those that hold nothing

    def _take(self, client: str, size_bytes: int) -> None:
        """Count `size_bytes` more for this client. Raises NoStorage where there is no room for them."""
        share = self._held[client] + size_bytes
        if share > self._limit_bytes / 2 or self._held.total() + size_bytes > self._limit_bytes:
            raise NoStorage(BUSY)
        self._held[client] = share

    def _write(self, file: BodyFile, data: bytes) -> None:
        """Append `data`. Raises NoStorage if the disk can't take it."""
        try:
            if fault := self._disk.fault():
                raise NoStorage(fault)
            file.write(data)
            file.flush()
        except OSError as error:
            reason = f"state_path can't take the body ({error.strerror}); free its disk"
            raise NoStorage(reason) from None
