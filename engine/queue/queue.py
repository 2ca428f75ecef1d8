"""The task queue: the store of the tasks, with the engines that work on them and estimates of the time they take."""

import asyncio
import contextlib
import heapq
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine import awake
from engine.catalog.models import Catalog, Model
from engine.files.outputs import Outputs
from engine.files.place import Place
from engine.job import Job
from engine.planning.machine import Machine
from engine.queue.endings import Limits
from engine.queue.events import EventKind, EventsLost
from engine.queue.facts import Facts
from engine.queue.journal import Journal
from engine.queue.runner import QueueRunner
from engine.queue.store import TaskStore
from engine.queue.tasks import Status, Task, WrongState
from engine.workers.lanes import Lanes, Runner

ADDED_UP_S = 1.0  # how old the sum of all that waits may be


class Unavailable(Exception):
    """No task can be taken now: the daemon is shutting down, the queue is full, or no engine can work."""


@dataclass(frozen=True)
class Receipt:
    """The answer to a submission. `replayed`: it is the answer to an earlier request with the same key."""

    answer: Mapping[str, Any]
    replayed: bool = False


class TaskQueue(TaskStore):
    """The tasks, from submission to their end. Used on the event loop only."""

    def __init__(
        self,
        journal: Journal,
        engines: Sequence[Runner],
        catalog: Catalog,
        outputs: Outputs,
        *,
        place: Place,
        limits: Limits,
    ) -> None:
        super().__init__(journal)
        self.lanes, self.facts, self.place = Lanes(engines), Facts(catalog), place
        self._limits = limits
        self.runner = QueueRunner(self, self.lanes, self.facts, place=place, outputs=outputs, limits=limits)
        self._submitting = 0
        self._taking = asyncio.Lock()  # input files: by a retry, or to remove them
        self._free_at: list[float] = []  # seconds until each lane is free, a heap
        self._added_up_at, self._seen_id = -math.inf, 0
        self._work: asyncio.Task[None]

    @contextlib.asynccontextmanager
    async def running(self, stop_s: float) -> AsyncIterator[None]:
        """Take up what the journal holds, run it and whatever is submitted, until the block ends; then `stop`."""
        await self.journal.prune(self._limits.history_count, self._limits.history_s)
        await self.facts.restore(self.journal)
        self.paused = await self.journal.fact("paused", False) is True
        await self.runner.restore()
        self._work = asyncio.create_task(self.runner.run(), name="queue runner")
        try:
            yield
        finally:
            await self.stop(stop_s)

    async def stop(self, stop_s: float) -> None:
        """Take no new work, answer who waits, and within `stop_s` seconds put the running tasks back."""
        self.events.close()
        self.runner.interrupt()
        with contextlib.suppress(TimeoutError):
            async with awake.timeout(stop_s):
                await asyncio.wait([self._work])
        self._work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._work

    @property
    def faults(self) -> dict[str, str]:
        """What keeps the queue from working, a sentence each; of the place as it was at the last look."""
        found = {"journal": self.journal_fault, "place": self.place.fault, "engine": self.lanes.fault}
        return {name: sentence for name, sentence in found.items() if sentence}

    async def submit(
        self, job: Job, warnings: Sequence[str] = (), *, key: str | None = None, request: str = ""
    ) -> Receipt:
        """Queue `job`. When this returns, it is on the disk.

        Raises Unavailable, JournalFault, or KeyReused if `key` was used for a request with another digest.
        """
        self.require_open()
        answer = {
            "position": len(self.waiting) + self._submitting + len(self.started) + 1,
            "estimated_wait": self.estimated_wait_s(),
            "seed": job.seed,
            "warnings": list(warnings),
        }
        task = Task(0, job, warnings=tuple(warnings))
        self._submitting += 1
        try:
            earlier = await self.journal.add(task, key, request, answer)
        finally:
            self._submitting -= 1
        if earlier:
            return Receipt(earlier, replayed=True)
        self.add(task)
        return Receipt({**answer, "task_id": task.id})

    async def replay(self, key: str, request: str) -> Receipt | None:
        """The answer that this key has had already; None for a new key. Raises KeyReused."""
        earlier = await self.journal.answer(key, request)
        return Receipt(earlier, replayed=True) if earlier else None

    def require_open(self) -> None:
        """Raises Unavailable if no task can be taken now."""
        if self.runner.closed:
            raise Unavailable("wangpd is shutting down and takes no new work")
        if len(self.waiting) + self._submitting >= (most := self._limits.max_queue):
            raise Unavailable(f"The queue is full: {most} tasks wait (max_queue)")
        for sentence in self.faults.values():
            raise Unavailable(sentence)

    async def retry(self, task_id: int, require: Callable[[Job], object] = lambda _: None) -> Receipt:
        """Queue the job of an ended task again, with its settings, seed and pictures.

        Raises NoSuchTask, or WrongState if it has not ended; and what `submit` and, in a thread, `require` raise.
        """
        task = await self.get(task_id)
        if not task.status.ended:
            raise WrongState(f"Task {task_id} is {task.status}; only an ended task can be retried")
        await self.place.look()
        async with self._taking:
            await asyncio.to_thread(require, task.job)
            return await self.submit(task.job, task.warnings)

    async def sweep(self, remove: Callable[[set[str]], int], *, unfinished_only: bool = False) -> int:
        """See Journal; no task is retried meanwhile either."""
        async with self._taking:
            return await self.journal.sweep(remove, unfinished_only)

    async def remove(self, task_id: int) -> Status:
        """See TaskStore; begins to cancel the work on a running task."""
        status = await super().remove(task_id)
        if not status.ended:
            self.lanes.cancel(task_id)
        return status

    def load(self, model: Model) -> bool:
        """Make `model` warm as soon as an engine is free; True if it is already."""
        if self.lanes.loaded(model.id):
            return True
        self.runner.to_load = [model]
        self.wake.set()
        return False

    def warm_up(self, model: Model) -> None:
        """Make `model` warm in every lane; not while tasks wait, for they bring their own."""
        if self.paused or not self.waiting:
            self.runner.to_load = [model] * len(self.lanes)
            self.wake.set()

    def unload(self) -> bool:
        """Give back all memory of the cards; False if there was none to give. Raises WrongState if an engine works."""
        if self.started or any(lane.holder for lane in self.lanes):
            raise WrongState("The engine works; wait for the task, or cancel it first")
        return self.lanes.unload()

    @property
    def machines(self) -> list[Machine]:
        """What was ever measured of the devices in use."""
        known = self.facts.machines
        return [known[lane.engine.device] for lane in self.lanes if lane.engine.device in known]

    def progress_percent(self, task: Task) -> float:
        """0 to 100; it only grows, and is 100 once the task is completed."""
        return 100.0 if task.status is Status.COMPLETED else task.progress

    def steps_done(self, task: Task) -> tuple[int, int]:
        """Denoising steps done and to do, over all runs of the task; the first only grows."""
        job, work = task.job, self.facts.work(task.job)
        total = job.steps * (work.runs if work else job.repeat_generation * job.batch_size)
        return total if task.status is Status.COMPLETED else task.steps_done, total

    def estimate_s(self, job: Job) -> float | None:
        """Seconds of its own work that `job` will take; None if no such job of its model has run."""
        return self.facts.estimate_s(job, self.lanes.loaded(job.model))

    def eta_s(self, task: Task) -> float | None:
        """Seconds of work still ahead of this task, none of them spent in the queue; None if nothing is known."""
        if task.status.ended:
            return None
        if clock := self.runner.clocks.get(task.id):
            left_s = clock.left_s(self.facts.pace(task.job), self.facts.estimate_s(task.job, warm=True))
            return None if left_s is None else round(left_s, 1)
        return self.estimate_s(task.job)

    def estimated_wait_s(self) -> float | None:
        """Seconds until a task that is submitted now would start; None if a task without history decides it."""
        for task in self._not_added_up():
            eta_s = self.eta_s(task)
            heapq.heapreplace(self._free_at, self._free_at[0] + (math.inf if eta_s is None else eta_s))
        return None if math.isinf(self._free_at[0]) else round(self._free_at[0], 1)

    def _not_added_up(self) -> list[Task]:
        """The tasks that `_free_at` lacks: new ones, so that a submission costs the same however many wait.

        It is all of them if a second has passed, or anything else has happened but progress, five times a second.
        """
        now, seen_id, self._seen_id = time.monotonic(), self._seen_id, self.events.last_id
        with contextlib.suppress(EventsLost):
            new = [event for event in self.events.since(seen_id) if event.kind is not EventKind.PROGRESS]
            if now - self._added_up_at < ADDED_UP_S and all(event.kind is EventKind.QUEUED for event in new):
                return [event.task for event in new if event.task]
        self._free_at, self._added_up_at = [0.0] * (len(self.lanes.up()) or len(self.lanes)), now
        return self.listing()
