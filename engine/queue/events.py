"""Events: the changes of the tasks, each published once, in order, after its commit.

A bounded ring keeps the newest, and a subscriber is a position in it: a slow one costs neither time nor memory.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice

from engine.queue.tasks import Task

KEPT = 1000


class EventKind(StrEnum):
    """The kinds of changes; the last three are about the whole queue."""

    QUEUED = "queued"
    STARTED = "started"
    PROGRESS = "progress"
    MOVED = "moved"
    REQUEUED = "requeued"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    RESUMED = "resumed"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class Event:
    """One change. `task` is the task right after it, or None if the change is about the whole queue."""

    id: int
    kind: EventKind
    task: Task | None


class EventsLost(Exception):
    """Some events are no longer kept: a subscriber must read the tasks themselves."""


class EventsEnded(Exception):
    """The daemon is stopping: subscribers are to answer with what they know now."""


class Events:
    """The ring. Used on the event loop only. Ids grow by 1."""

    def __init__(self, kept: int = KEPT) -> None:
        self._ring: deque[Event] = deque(maxlen=kept)
        self.news = asyncio.Event()
        self.closed = False
        self.last_id = time.time_ns() // 1000  # above every id of an earlier start of the daemon

    def publish(self, kind: EventKind, task: Task | None = None) -> None:
        """Append an event and wake the subscribers."""
        self.last_id += 1
        self._ring.append(Event(self.last_id, kind, task))
        self._wake()

    def close(self) -> None:
        """End all subscriptions, those that are made later too, so that no client delays a stop."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        self.news.set()
        self.news.clear()  # whoever waits now has been woken; the next wait is for the next event

    def since(self, last_id: int) -> Sequence[Event]:
        """The events after `last_id`, oldest first. Raises EventsLost if some of them are no longer kept."""
        count = self.last_id - last_id
        if not 0 <= count <= len(self._ring):
            raise EventsLost
        return list(islice(reversed(self._ring), count))[::-1]

    def subscribe(self) -> "Subscription":
        """A subscription to what is published from now on."""
        return Subscription(self)


class Subscription:
    """Reads the events in order. There is nothing to close."""

    def __init__(self, events: Events) -> None:
        self._events, self._last_id = events, events.last_id

    async def read(self) -> Sequence[Event]:
        """Wait for at least one event since the last call, and return all since then.

        Raises EventsLost if some are no longer kept; the next call waits for what is published from now on. Raises
        EventsEnded if there is none and the daemon stops.
        """
        while self._events.last_id == self._last_id:
            if self._events.closed:
                raise EventsEnded
            await self._events.news.wait()
        last_id, self._last_id = self._last_id, self._events.last_id
        return self._events.since(last_id)
