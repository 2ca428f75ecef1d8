"""The tasks that have not ended, and every change of them: committed, then shown, then published."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from engine.queue.events import EventKind, Events
from engine.queue.journal import Journal, JournalFault
from engine.queue.order import Order, ranks_of
from engine.queue.tasks import Status, Task, ended

log = logging.getLogger("wangpd.queue")
T = TypeVar("T")
SAVE_AGAIN_S = 5.0
KINDS: Mapping[Status, EventKind] = {
    Status.QUEUED: EventKind.REQUEUED,
    Status.PROCESSING: EventKind.STARTED,
    Status.CANCELLING: EventKind.CANCELLING,
    Status.COMPLETED: EventKind.COMPLETED,
    Status.FAILED: EventKind.FAILED,
    Status.CANCELLED: EventKind.CANCELLED,
}


class TaskStore:
    """Owns the current version of each task that has not ended.

    A Task that was handed out is never changed: a change makes another version of it, whose row is committed before
    any client can see it. Changes are made one at a time; reading waits for none of them. Ended tasks are only in the
    journal, so memory does not grow with history. Used on the event loop only.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal, self.events = journal, Events()
        self.waiting = Order()
        self.running: dict[int, Task] = {}  # in order of start
        self.paused = False
        self.fault = ""  # of the journal, while the end or the start of a task can't be written
        self._changing = asyncio.Lock()

    def active(self, task_id: int) -> Task | None:
        """The current version of a task that has not ended."""
        return self.running.get(task_id) or self.waiting.get(task_id)

    async def restore(self, order: Sequence[Task]) -> None:
        """Let the tasks of a former life wait in this order."""
        ranks = ranks_of([task.id for task in order])
        await self.journal.save(ranks=ranks)
        self.waiting.rerank(ranks)
        for task in order:
            self.waiting.add(task)

    def add(self, task: Task) -> None:
        """Let a new task wait, whose row is in the journal."""
        self.waiting.add(task)
        self.events.publish(EventKind.QUEUED, task)

    async def start(self, task: Task) -> bool:
        """Let the first waiting task run; False if it is not the first any more, or the queue is paused by now."""
        async with self._changing:
            if self.waiting.first is not task or self.paused:
                return False
            await self._commit(
                [replace(task, status=Status.PROCESSING, started_at=time.time(), attempts=task.attempts + 1)]
            )
            return True

    async def settle(self, task_id: int, outcome: Callable[[Task], Task], **facts: Any) -> Task:
        """End a running task, or put it back, as `outcome` makes of its current version; stores `facts` with that."""
        async with self._changing:
            task = outcome(self.running[task_id])
            await self._commit([task], **facts)
            return task

    async def cancel(self, task_id: int) -> Task | None:
        """Cancel a waiting task, or let a running one be `cancelling`; its new version, or None if it has ended."""
        async with self._changing:
            task = self.active(task_id)
            if task and task.status is not Status.CANCELLING:
                running = task_id in self.running
                task = replace(task, status=Status.CANCELLING) if running else ended(task, Status.CANCELLED)
                await self._commit([task])
            return task

    async def clear(self) -> int:
        """Cancel all waiting tasks; returns how many there were."""
        async with self._changing:
            cleared = [ended(task, Status.CANCELLED) for task in self.waiting]
            await self._commit(cleared)
            self.events.publish(EventKind.CLEARED)
            return len(cleared)

    async def move(self, task_id: int, position: int) -> int | None:
        """Move a waiting task to `position`, never before those that run, or past the end; None if it does not wait."""
        async with self._changing:
            task, ahead = self.waiting.get(task_id), 1 + len(self.running)
            if task is None:
                return None
            place = min(max(position - ahead, 0), len(self.waiting) - 1)
            ranks = self.waiting.ranks_for(task_id, place)
            await self.journal.save(ranks=ranks)
            self.waiting.rerank(ranks)
            self.events.publish(EventKind.MOVED, task)
            return place + ahead

    async def pause(self, paused: bool) -> None:
        """Let no waiting task start, or let them start again; remembered over a restart."""
        async with self._changing:
            await self.journal.set_fact("paused", paused)
            if paused is not self.paused:
                self.paused = paused
                self.events.publish(EventKind.PAUSED if paused else EventKind.RESUMED)

    async def advance(self, newer: Callable[[Task], Task]) -> None:
        """Let running tasks be further on, as `newer` makes of each. The journal learns of it with their end."""
        async with self._changing:
            for task in list(self.running.values()):
                if (further := newer(task)) is not task:
                    self.running[task.id] = further
                    self.events.publish(EventKind.PROGRESS, further)

    def forget(self, task_id: int) -> None:
        """Let go of a task that could not be brought to its end; the next start of the daemon takes it up."""
        self.running.pop(task_id, None)
        self.waiting.remove(task_id)

    async def _commit(self, tasks: Sequence[Task], **facts: Any) -> None:
        """Make these versions the current ones. Raises JournalFault, and then nothing has changed."""
        await self.journal.save(*tasks, **facts)
        for task in tasks:
            if task.status in (Status.PROCESSING, Status.CANCELLING):
                self.waiting.take(task.id)
                self.running[task.id] = task
                continue
            self.running.pop(task.id, None)
            if task.status is Status.QUEUED:
                self.waiting.add(task)
            else:
                self.waiting.remove(task.id)
        for task in tasks:
            self.events.publish(KINDS[task.status], task)

    async def insist(self, change: Callable[[], Awaitable[T]]) -> T:
        """The result of `change`, which is tried until it is committed, however long the disk needs."""
        while True:
            try:
                done = await change()
            except JournalFault as fault:
                self.fault = str(fault)
                log.error("%s", fault)
                await asyncio.sleep(SAVE_AGAIN_S)
            else:
                self.fault = ""
                return done
