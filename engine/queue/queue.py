"""The task queue: what the handlers ask of it, over the store that owns the tasks and the runner that works on them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.catalog.models import Catalog, Model
from engine.job import Job
from engine.queue.events import EventsLost
from engine.queue.facts import Facts
from engine.queue.journal import Journal, Reply
from engine.queue.progress import QueueView
from engine.queue.runner import Files, Limits, QueueRunner
from engine.queue.store import TaskStore
from engine.queue.tasks import Status, Task
from engine.workers.lanes import Lanes, Runner


class NoSuchTask(Exception):
    """No task has this id, or its record is no longer kept."""


class WrongState(Exception):
    """The task is not in a state that allows this."""


class Closed(Exception):
    """The daemon is shutting down and takes no new work."""


class Full(Exception):
    """As many tasks wait as may."""


class EngineDown(Exception):
    """The generation process can't work on this machine as it is."""


class Busy(Exception):
    """An engine works, and this would end its work."""


class KeyReused(Exception):
    """The idempotency key was used for another request."""


@dataclass(frozen=True)
class Receipt:
    """The answer to a submission. `replayed`: it is the answer to an earlier request with the same key."""

    answer: Mapping[str, Any]
    replayed: bool = False


class TaskQueue(QueueView):
    """The tasks, from submission to their end. Used on the event loop only."""

    def __init__(
        self,
        journal: Journal,
        engines: Sequence[Runner],
        catalog: Catalog,
        files: Files,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(TaskStore(journal), Lanes(engines), catalog, Facts())
        self._journal, self._limits = journal, limits or Limits()
        self._runner = QueueRunner(
            self._store, self._lanes, self._facts, catalog=catalog, files=files, limits=self._limits
        )
        self._submitting = 0
        self._work: asyncio.Task[None]

    # -- life

    @contextlib.asynccontextmanager
    async def running(self, stop_s: float) -> AsyncIterator[None]:
        """Take up what the journal holds, run it and whatever is submitted, until the block ends.

        Then the running tasks are stopped within `stop_s` seconds and put back, as if they had never started.
        """
        await self._facts.restore(self._journal)
        self._store.paused = await self._journal.fact("paused", False)
        await self._runner.restore()
        self._work = asyncio.create_task(self._runner.run(), name="queue runner")
        try:
            yield
        finally:
            await self.stop(stop_s)

    async def stop(self, stop_s: float) -> None:
        """Take no new work, and stop the running tasks within `stop_s` seconds; they are put back then."""
        self.interrupt()
        await asyncio.wait([self._work], timeout=stop_s)
        self._work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._work

    @property
    def closed(self) -> bool:
        """No new work is taken."""
        return self._runner.closed

    def close(self) -> None:
        """Take no new work and start none."""
        self._runner.close()

    def interrupt(self) -> None:
        """Take no new work, and begin to stop the running tasks, which will be put back."""
        self._runner.interrupt()

    # -- submissions

    async def submit(
        self, job: Job, warnings: Sequence[str] = (), *, key: str | None = None, request: str = ""
    ) -> Receipt:
        """Queue `job`. When this returns, it is on the disk.

        Raises Closed, Full, EngineDown, JournalFault, or KeyReused if `key` was used for a request with another digest.
        """
        self.require_open()
        answer = {
            "position": len(self._store.waiting) + self._submitting + len(self._store.running) + 1,
            "estimated_wait": self.estimated_wait_s(),
            "seed": job.seed,
            "warnings": list(warnings),
        }
        task = Task(0, job, warnings=tuple(warnings))
        self._submitting += 1
        try:
            reply = await self._journal.add(task, key, request, answer)
        finally:
            self._submitting -= 1
        if reply:
            return self._replayed(reply, request)
        self._store.add(task)
        self._runner.wake.set()
        return Receipt({**answer, "task_id": task.id})

    async def replay(self, key: str, request: str) -> Receipt | None:
        """The answer that this key has had already, whatever state the queue is in now; None for a new key.

        Raises KeyReused.
        """
        reply = await self._journal.reply(key)
        return self._replayed(reply, request) if reply else None

    def _replayed(self, reply: Reply, request: str) -> Receipt:
        if reply.request != request:
            raise KeyReused("Idempotency-Key: it was used for another request; take a new key")
        return Receipt(reply.answer, replayed=True)

    def require_open(self) -> None:
        """Raises Closed, Full or EngineDown if no task can be taken now."""
        if self.closed:
            raise Closed("wangpd is shutting down and takes no new work")
        if len(self._store.waiting) + self._submitting >= self._limits.max_queue:
            raise Full(f"The queue is full: {self._limits.max_queue} tasks wait (max_queue)")
        if not self._lanes.up():
            raise EngineDown(self._lanes.fault)

    async def retry(self, task_id: int) -> Receipt:
        """Queue the job of an ended task again, with its settings, seed and pictures.

        Raises NoSuchTask, or WrongState if it has not ended; and what `submit` raises.
        """
        task = await self.get(task_id)
        if not task.status.ended:
            raise WrongState(f"Task {task_id} is {task.status}; only an ended task can be retried")
        return await self.submit(task.job, task.warnings)

    # -- changes of what runs and waits

    async def remove(self, task_id: int) -> Status:
        """Take a waiting task out, or begin to cancel a running one; returns its new status.

        Raises NoSuchTask, WrongState if it has ended, or JournalFault, and then nothing has changed.
        """
        task = await self._store.cancel(task_id)
        if task is None:
            task = await self.get(task_id)
            raise WrongState(f"Task {task_id} has already ended ({task.status}); there is nothing to remove")
        if not task.status.ended:
            self._lanes.cancel(task_id)
        return task.status

    async def clear(self) -> int:
        """Take out all waiting tasks and return how many there were; those that run go on. Raises JournalFault."""
        return await self._store.clear()

    async def pause(self, paused: bool) -> None:
        """Start no waiting task, or start them again; remembered over a restart. Running tasks go on."""
        await self._store.pause(paused)
        self._runner.wake.set()

    async def move(self, task_id: int, position: int) -> int:
        """Put a waiting task at `position` and return where it is: never before those that run, or past the end.

        Raises NoSuchTask, WrongState if it does not wait, or JournalFault, and then it is where it was.
        """
        moved_to = await self._store.move(task_id, position)
        if moved_to is None:
            task = await self.get(task_id)
            raise WrongState(f"Task {task_id} is {task.status}; only a waiting task can be moved")
        return moved_to

    def load(self, model: Model) -> bool:
        """Make `model` warm as soon as an engine is free; True if it is already."""
        if self._lanes.loaded(model.id):
            return True
        self._runner.to_load = [model]
        self._runner.wake.set()
        return False

    def warm_up(self, model: Model) -> None:
        """Make `model` warm in every lane; not while tasks wait, for they bring their own."""
        if self.paused or not self._store.waiting:
            self._runner.to_load = [model] * len(self._lanes)
            self._runner.wake.set()

    def unload(self) -> bool:
        """Give back all memory of the cards; False if there was nothing to give. Raises Busy if an engine works."""
        if self._store.running or self._lanes.busy:
            raise Busy("The engine works; wait for the task, or cancel it first")
        return self._lanes.unload()

    # -- tasks

    async def get(self, task_id: int) -> Task:
        """The task with this id, ended or not. Raises NoSuchTask."""
        task = self.active(task_id) or await self._journal.get(task_id)
        if task is None:
            raise NoSuchTask(f"Task {task_id} not found")
        return task

    async def wait(self, task_id: int, timeout_s: float) -> Task:
        """The task once it has ended, or as it is after `timeout_s`. Raises NoSuchTask."""
        subscription = self.events.subscribe()  # first: an end that comes while `get` asks the journal is not missed
        task = await self.get(task_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not task.status.ended:
                    try:
                        for event in await subscription.read():
                            if event.task and event.task.id == task_id:
                                task = event.task
                    except EventsLost:
                        task = await self.get(task_id)
        return task

    async def history(self, status: Status | None, limit: int, offset: int) -> tuple[list[Task], int]:
        """A page of all tasks, newest first, and how many there are."""
        tasks, total = await self._journal.history(status, limit, offset)
        return [self.active(task.id) or task for task in tasks], total
