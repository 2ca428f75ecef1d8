"""The tasks that have not ended, and every change of them: committed, then shown, then published."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from engine.queue.events import EventKind, Events, EventsEnded, EventsLost
from engine.queue.journal import Journal, JournalFault
from engine.queue.order import Order, ranks_of
from engine.queue.tasks import NoSuchTask, Status, Task, WrongState, ended

log = logging.getLogger("wangpd.queue")
T = TypeVar("T")
SAVE_AGAIN_S = 5.0
AT_ONCE = 512  # tasks in a commit: submissions wait for it, and its disk may have room for fewer only
KINDS: Mapping[Status, EventKind] = {Status.QUEUED: EventKind.REQUEUED, Status.PROCESSING: EventKind.STARTED}


class TaskStore:
    """Owns the current version of each task that has not ended. Used on the event loop only.

    A Task that was handed out is never changed: a change makes another version of it, whose row is committed before
    any client can see it. Changes are made one at a time; reading waits for none of them. Ended tasks are only in the
    journal, so memory does not grow with history. A change that raises JournalFault has changed nothing.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal, self.events = journal, Events()
        self.wake = asyncio.Event()  # set when there may be something to start
        self.waiting = Order()
        self.started: dict[int, Task] = {}  # those that run, in the order of their start
        self.released = asyncio.Event()  # set when a task was cancelled that has inputs
        self.paused = False  # no waiting task starts
        self.journal_fault = ""  # while the end or the start of a task can't be written
        self._changing = asyncio.Lock()

    def active(self, task_id: int) -> Task | None:
        """The current version of a task that has not ended."""
        return self.started.get(task_id) or self.waiting.get(task_id)

    def listing(self) -> list[Task]:
        """The tasks that have not ended: those that run, then those that wait, in their order."""
        return [*self.started.values(), *self.waiting]

    @property
    def at_work(self) -> list[Task]:
        """The tasks that run, in the order in which they started."""
        return list(self.started.values())

    def position(self, task: Task) -> int | None:
        """1 for a task that runs or is next, the others count on from those that run; None once it has ended."""
        if task.id in self.started:
            return 1
        place = self.waiting.place(task.id)
        return None if place is None else place + 1 + len(self.started)

    async def get(self, task_id: int) -> Task:
        """The task with this id, ended or not. Raises NoSuchTask."""
        task = self.active(task_id) or await self.journal.get(task_id)
        if task is None:
            raise NoSuchTask(f"Task {task_id} not found")
        return task

    async def wait(self, task_id: int, timeout_s: float) -> Task:
        """The task once it has ended, or as it is after `timeout_s` or at a stop of the daemon. Raises NoSuchTask."""
        subscription = self.events.subscribe()  # first: an end that comes while `get` asks the journal is not missed
        task = await self.get(task_id)
        with suppress(TimeoutError, EventsEnded):
            async with asyncio.timeout(timeout_s):
                while not task.status.ended:
                    try:
                        news = [event.task for event in await subscription.read() if event.task]
                    except EventsLost:
                        news = [await self.get(task_id)]
                    task = next((newer for newer in reversed(news) if newer.id == task_id), task)
        return task

    def add(self, task: Task) -> None:
        """Let a new task wait, whose row is in the journal."""
        self.waiting.add(task)
        self.events.publish(EventKind.QUEUED, task)
        self.wake.set()

    async def remove(self, task_id: int) -> Status:
        """Cancel a waiting task, or let a running one be `cancelling`; returns its new status.

        Raises NoSuchTask, WrongState if it has ended, or JournalFault.
        """
        async with self._changing:
            task = self.active(task_id)
            if task is None:
                status = (await self.get(task_id)).status
                raise WrongState(f"Task {task_id} has already ended ({status}); there is nothing to remove")
            if task.status is not Status.CANCELLING:
                running = task_id in self.started
                task = replace(task, status=Status.CANCELLING) if running else ended(task, Status.CANCELLED)
                await self._commit(task)
            return task.status

    async def clear(self) -> int:
        """Take out all waiting tasks and return how many there were; some may be out already at a JournalFault."""
        async with self._changing:
            waiting = list(self.waiting)
            done, at_once = 0, AT_ONCE
            while done < len(waiting):
                try:
                    await self._commit(*(ended(task, Status.CANCELLED) for task in waiting[done : done + at_once]))
                except JournalFault:
                    if at_once == 1:
                        raise
                    at_once = max(1, at_once // 8)
                else:
                    done += at_once
            self.events.publish(EventKind.CLEARED)
            return len(waiting)

    async def move(self, task_id: int, position: int) -> int:
        """Put a waiting task at `position` and return where it is: never before those that run, or past the end.

        Raises NoSuchTask, WrongState if it does not wait, or JournalFault.
        """
        async with self._changing:
            task, ahead = self.waiting.get(task_id), 1 + len(self.started)
            if task is None:
                status = (await self.get(task_id)).status
                raise WrongState(f"Task {task_id} is {status}; only a waiting task can be moved")
            place = min(max(position - ahead, 0), len(self.waiting) - 1)
            await self._rerank(self.waiting.ranks_for(task_id, place))
            self.events.publish(EventKind.MOVED, task)
            return place + ahead

    async def pause(self, paused: bool) -> None:
        """Start no waiting task, or start them again; remembered over a restart. Running tasks go on."""
        async with self._changing:
            await self.journal.save(paused=paused)
            if paused is not self.paused:
                self.paused = paused
                self.events.publish(EventKind.PAUSED if paused else EventKind.RESUMED)
                self.wake.set()

    async def restore(self, order: Sequence[Task], started: Sequence[Task]) -> None:
        """Let the tasks of a former life wait in this order, and those of `started` run on."""
        self.started = {task.id: task for task in started}
        await self._rerank(ranks_of([task.id for task in (*started, *order)]))
        for task in started:
            self.waiting.take(task.id)
        for task in order:
            self.waiting.add(task)

    async def start(self, task: Task) -> bool:
        """Let the first waiting task run; False if it is not the first any more, or the queue is paused by now."""
        async with self._changing:
            if self.waiting.first is not task or self.paused:
                return False
            attempts, now = task.attempts + 1, max(time.time(), task.created_at)  # the clock may have been set back
            await self._commit(replace(task, status=Status.PROCESSING, started_at=now, attempts=attempts))
            return True

    async def settle(self, task_id: int, outcome: Callable[[Task], Task], **facts: Any) -> Task:
        """End a running task, or put it back, as `outcome` makes of its current version; stores `facts` with that."""
        async with self._changing:
            task = outcome(self.started[task_id])
            await self._commit(task, **facts)
            return task

    async def keep(self, task_id: int, **made: Any) -> None:
        """Store what a running task has made, before it has ended."""
        async with self._changing:
            task = replace(self.started[task_id], **made)
            await self.journal.save(task)
            self.started[task_id] = task

    async def advance(self, task_id: int, newer: Callable[[Task], Task]) -> None:
        """Let a running task be further on, as `newer` makes of it. The journal learns of it with its end."""
        async with self._changing:
            task = self.started[task_id]
            if (further := newer(task)) is not task:
                self.started[task_id] = further
                self.events.publish(EventKind.PROGRESS, further)

    def forget(self, task_id: int) -> None:
        """Let go of a task that could not be brought to its end; the next start of the daemon takes it up."""
        self.started.pop(task_id, None)
        self.waiting.remove(task_id)

    async def insist(self, change: Callable[[], Awaitable[T]]) -> T:
        """The result of `change`, which is tried until it is committed, however long the disk needs."""
        while True:
            try:
                done = await change()
            except JournalFault as fault:
                if not self.journal_fault:  # once, not at every try
                    log.error("%s", fault)
                self.journal_fault = str(fault)
                await asyncio.sleep(SAVE_AGAIN_S)
            else:
                if self.journal_fault:
                    log.info("the journal can be used again")
                self.journal_fault = ""
                return done

    async def _rerank(self, ranks: Mapping[int, float]) -> None:
        await self.journal.save(ranks=ranks)
        self.waiting.rerank(ranks)

    async def _commit(self, *tasks: Task, **facts: Any) -> None:
        """Make these versions the current ones. Raises JournalFault, and then nothing has changed."""
        await self.journal.save(*tasks, **facts)
        for task in tasks:
            if task.status in (Status.PROCESSING, Status.CANCELLING):
                self.waiting.take(task.id)
                self.started[task.id] = task
                continue
            self.started.pop(task.id, None)
            if task.status is Status.QUEUED:
                self.waiting.add(task)
            else:
                self.waiting.remove(task.id)
                if task.status is Status.CANCELLED and task.job.inputs:
                    self.released.set()
        for task in tasks:
            self.events.publish(KINDS.get(task.status) or EventKind(task.status), task)
