"""Writing files beside the generation: while a file is encoded, the next frames are already made."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")

MOST_WAITING_BYTES = 2**30  # of frames that are made and not yet encoded


class Broken(Exception):
    """The pieces of a file could not all be made."""


class _Handover(Generic[T]):
    """A queue of pieces from the thread that makes them to the one that writes them, limited in bytes."""

    def __init__(self, size_bytes: Callable[[T], int]) -> None:
        self._size_bytes = size_bytes
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._state = "open"  # then ended (complete), broken (the rest can't be made) or left (the writer has stopped)

    def put(self, piece: T) -> bool:
        """Add a piece, once those that wait leave room; False if the writer has stopped."""
        with self._changed:
            self._changed.wait_for(self._has_room)
            self._waiting.append(piece)
            self._changed.notify_all()
            return self._state != "left"

    def _has_room(self) -> bool:
        return self._state == "left" or sum(map(self._size_bytes, self._waiting)) < MOST_WAITING_BYTES

    def close(self, state: str) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def taken(self) -> Iterator[T]:
        """The pieces as they come. Raises Broken."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._state != "open")
                if self._state == "broken":
                    raise Broken
                if not self._waiting:
                    return
                piece = self._waiting.popleft()
                self._changed.notify_all()
            yield piece


def feed(
    thread: ThreadPoolExecutor, pieces: Iterable[T], write: Callable[[Iterator[T]], Any], size_bytes: Callable[[T], int]
) -> "Future[Any]":
    """Pass `pieces` to `write` in `thread`, each as soon as it is made; returns when the last one is made.

    Raises what making them or `write` raises, and then `write` has ended: with Broken, if making them failed.
    """
    handover = _Handover(size_bytes)
    written = thread.submit(write, handover.taken())
    written.add_done_callback(lambda _: handover.close("left"))
    try:
        for piece in pieces:
            if not handover.put(piece):
                written.result()
    except BaseException:
        handover.close("broken")
        wait([written])
        raise
    handover.close("ended")
    return written
