"""Turns at work that is heavy enough for one client to keep all others waiting."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class Turns:
    """At most `most` blocks run at a time, one of each client. A client that was served goes behind all that wait."""

    def __init__(self, most: int) -> None:
        self._slots = asyncio.Semaphore(most)
        self._own: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of clients that wait or are served

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Run the block when it is this client's turn."""
        async with self._own.setdefault(client, asyncio.Lock()), self._slots:
            yield
