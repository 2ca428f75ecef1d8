"""Waiting times that count only while this process is awake.

A stopped process, a paused container or a suspended machine wakes up with every timer due at once, and whoever it
waited for may wake later. After such a sleep a wait begins again.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

LOOK_S = 1.0  # the longest part of a wait
LATE_S = 0.5  # a part that ends later than this has been slept through


class Wait:
    """How long something has taken so far."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    async def go_on(self, seconds: float) -> None:
        """Sleep for `seconds` and add them to `spent_s`, which begins at 0 again if this process did not run."""
        began = time.monotonic()
        await asyncio.sleep(seconds)
        late = time.monotonic() - began - seconds > LATE_S
        self.spent_s = 0.0 if late else self.spent_s + seconds


async def sleep(seconds: float) -> None:
    """Sleep for `seconds` of this process's own time."""
    waiting = Wait()
    while (left_s := seconds - waiting.spent_s) > 0:
        await waiting.go_on(min(LOOK_S, left_s))


@asynccontextmanager
async def timeout(seconds: float) -> AsyncIterator[None]:
    """End the block after `seconds` of this process's own time. Raises TimeoutError then."""

    async def expire() -> None:
        await sleep(seconds)
        limit.reschedule(asyncio.get_running_loop().time())

    async with asyncio.timeout(None) as limit:
        timer = asyncio.create_task(expire())
        try:
            yield
        finally:
            timer.cancel()
