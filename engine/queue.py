"""The task queue: an asyncio structure on the event loop, its states, and the runner that feeds the engine."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.catalog import Catalog, UnknownModel
from engine.executor import Progress
from engine.job import Cancelled, EngineError, Job, Phase, Result
from engine.journal import Journal
from engine.speeds import Speeds
from engine.task import Status, Task

log = logging.getLogger("wangpd.queue")

# How far a pass through the pipeline is when a phase begins, and how much of it that phase is.
SHARES: Mapping[Phase, tuple[float, float]] = {
    Phase.IDLE: (0.0, 0.0),
    Phase.LOADING: (0.0, 0.0),
    Phase.ENCODING: (0.0, 0.02),
    Phase.DENOISING: (0.02, 0.9),
    Phase.DECODING: (0.92, 0.05),
    Phase.SAVING: (0.97, 0.03),
}


class NoSuchTask(Exception):
    """No task has this id, or its record is no longer kept."""


class WrongState(Exception):
    """The task is not in a state that allows this."""


class Closed(Exception):
    """The daemon is shutting down and takes no new work."""


class Full(Exception):
    """As many tasks wait as may."""


class KeyReused(Exception):
    """The idempotency key was used for another request."""


class Runner(Protocol):
    """What the queue needs of an Engine."""

    loaded: str | None

    async def run(self, task_id: int, job: Job, model: Any) -> Result:
        """Run one job. Raises EngineError or Cancelled."""

    def cancel(self, task_id: int) -> None:
        """End the job that runs."""

    def progress(self, task_id: int) -> Progress | None:
        """How far it is."""


class Files(Protocol):
    """What the queue needs of the output folder."""

    def remove_attempt(self, task_id: int) -> int:
        """Delete what a broken attempt of this task left, finished files too."""

    def remove_parts(self, task_id: int) -> int:
        """Delete what this task did not finish writing."""


@dataclass(frozen=True)
class Limits:
    """How much the queue holds and keeps, and what it does with work that a restart interrupted."""

    max_queue: int = 1000
    max_attempts: int = 2
    on_restart: str = "resume"  # resume, pause, fail
    history_count: int = 10_000
    history_s: float = 30 * 24 * 3600


@dataclass(frozen=True)
class Receipt:
    """What a client is told of its submission. `replayed`: it is the answer to an earlier request with the same key."""

    answer: Mapping[str, Any]
    replayed: bool = False


class TaskQueue:
    """Owns the tasks that have not ended, their order and their states; every change is in the journal first.

    Used on the event loop only. Ended tasks live in the journal alone, so memory does not grow with history.
    """

    def __init__(
        self, journal: Journal, engine: Runner, catalog: Catalog, files: Files, limits: Limits | None = None
    ) -> None:
        self._journal, self._engine, self._catalog, self._files = journal, engine, catalog, files
        self._limits = limits or Limits()
        self._speeds = Speeds({})
        self._waiting: dict[int, Task] = {}  # in order
        self._current: Task | None = None
        self._submitting = 0
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._closed = False
        self.paused = False
        self.interrupted: set[int] = set()

    # -- life

    @contextlib.asynccontextmanager
    async def running(self, stop_s: float) -> AsyncIterator[None]:
        """Take up what the journal holds, run it and whatever is submitted, until the block ends.

        Then the running task is stopped within `stop_s` seconds and put back, as if it had never started.
        """
        await self._restore()
        runner = asyncio.create_task(self._run(), name="queue runner")
        try:
            yield
        finally:
            await self._stop(runner, stop_s)

    async def _restore(self) -> None:
        self._speeds = Speeds(await self._journal.fact("speeds", {}))
        self.paused = await self._journal.fact("paused", False)
        unfinished = await self._journal.unfinished()
        started = [task for task in unfinished if task.status is not Status.QUEUED]
        for task in started:
            await self._take_up(task)
        order = [task for task in (*started, *unfinished) if task.status is Status.QUEUED]
        self._waiting = {task.id: task for task in order}
        await self._journal.reorder(list(self._waiting))
        self._wake.set()

    async def _take_up(self, task: Task) -> None:
        """Decide what becomes of a task that was under way when the daemon ended."""
        await asyncio.to_thread(self._files.remove_attempt, task.id)
        task.files = ()
        if task.status is Status.CANCELLING:
            self._end(task, Status.CANCELLED)
        elif self._limits.on_restart == "fail":
            self._end(task, Status.FAILED, "restarted", 'wangpd ended while this task ran; on_restart is "fail".')
        elif task.attempts >= self._limits.max_attempts:
            sentence = (
                f"wangpd ended {task.attempts} times while this task ran; max_attempts is {self._limits.max_attempts}."
            )
            self._end(task, Status.FAILED, "too_many_attempts", sentence)
        else:
            task.status, task.started_at = Status.QUEUED, None
            if self._limits.on_restart == "pause":
                self.paused = True
        await self._journal.save(task)

    async def _stop(self, runner: asyncio.Task[None], stop_s: float) -> None:
        self.close()
        if self._current:
            self.interrupted.add(self._current.id)
            self._engine.cancel(self._current.id)
        await asyncio.wait([runner], timeout=stop_s)
        runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await runner

    def close(self) -> None:
        """Take no new work and start none."""
        self._closed = True
        self._wake.set()

    # -- what clients ask for

    async def submit(
        self, job: Job, warnings: Sequence[str] = (), *, key: str | None = None, request: str = ""
    ) -> Receipt:
        """Queue `job`. When this returns, it is on the disk.

        Raises Closed, Full, or KeyReused if `key` was used for a request with another digest.
        """
        if self._closed:
            raise Closed
        if len(self._waiting) + self._submitting >= self._limits.max_queue:
            raise Full
        answer = {
            "position": len(self._waiting) + self._submitting + bool(self._current) + 1,
            "estimated_wait": self.estimated_wait_s(),
            "seed": job.seed,
            "warnings": list(warnings),
        }
        task = Task(0, job, warnings=tuple(warnings))
        self._submitting += 1
        try:
            stored = await self._journal.add(task, key, request, answer)
        finally:
            self._submitting -= 1
        if stored.reply:
            if stored.reply.request != request:
                raise KeyReused
            return Receipt(stored.reply.answer, replayed=True)
        self._waiting[task.id] = task
        self._wake.set()
        return Receipt({**answer, "task_id": task.id})

    async def get(self, task_id: int) -> Task:
        """The task with this id, ended or not. Raises NoSuchTask."""
        task = self.active(task_id) or await self._journal.get(task_id)
        if task is None:
            raise NoSuchTask(f"Task {task_id} not found")
        return task

    def active(self, task_id: int) -> Task | None:
        """The task with this id if it has not ended."""
        if self._current and self._current.id == task_id:
            return self._current
        return self._waiting.get(task_id)

    def listing(self) -> list[Task]:
        """The tasks that have not ended: the running one, then those that wait, in their order."""
        return [*([self._current] if self._current else []), *self._waiting.values()]

    @property
    def current(self) -> Task | None:
        """The task that runs."""
        return self._current

    async def remove(self, task_id: int) -> Status:
        """Take a waiting task out, or begin to cancel the running one; returns its new status.

        Raises NoSuchTask, or WrongState if it has ended.
        """
        if task := self._waiting.pop(task_id, None):
            self._end(task, Status.CANCELLED)
            await self._journal.save(task)
            await self._announce()
            return task.status
        task = await self.get(task_id)
        if task.status.ended:
            raise WrongState(f"Task {task_id} has already ended ({task.status}); there is nothing to remove")
        if task is not self._current:
            return await self.remove(task_id)  # it went back to waiting while the journal was asked
        task.status = Status.CANCELLING
        self._engine.cancel(task_id)
        await self._journal.save(task)
        return task.status

    async def clear(self) -> int:
        """Take out all waiting tasks and return how many there were; the running one goes on."""
        removed, self._waiting = list(self._waiting.values()), {}
        for task in removed:
            self._end(task, Status.CANCELLED)
        await self._journal.save(*removed)
        await self._announce()
        return len(removed)

    async def wait(self, task_id: int, timeout_s: float) -> Task:
        """The task once it has ended, or as it is after `timeout_s`. Raises NoSuchTask."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: not self.active(task_id))
        return await self.get(task_id)

    # -- what it looks like from outside

    def position(self, task: Task) -> int | None:
        """1 for the task that runs or is next; None once it has ended."""
        if task is self._current:
            return 1
        places = {task_id: place for place, task_id in enumerate(self._waiting, start=1)}
        place = places.get(task.id)
        return place and place + bool(self._current)

    def steps_done(self, task: Task) -> tuple[int, int]:
        """Denoising steps done and to do, over all files of the task."""
        progress = self._engine.progress(task.id)
        files = task.job.batch_size * task.job.repeat_generation
        runs = progress.runs if progress and progress.runs else files
        total = task.job.steps * (runs if progress else files)
        if task.status is Status.COMPLETED:
            return total, total
        return (progress.run * progress.steps + progress.step if progress else 0), total

    def progress_percent(self, task: Task) -> float:
        """0 to 100; it only grows, and is 100 once the task is completed."""
        if task.status is Status.COMPLETED:
            return 100.0
        progress = self._engine.progress(task.id)
        if not progress or not progress.runs:
            return 0.0
        start, share = SHARES[progress.phase]
        part = progress.step / progress.steps if progress.phase is Phase.DENOISING and progress.steps else 0.0
        return round(min(99.9, 100 * (progress.run + start + share * part) / progress.runs), 1)

    def phase(self, task: Task) -> str | None:
        """`loading`, `encoding` … while the task runs."""
        progress = self._engine.progress(task.id)
        return progress.phase.name.lower() if progress and progress.phase else None

    def eta_s(self, task: Task) -> float | None:
        """Seconds of work still ahead of this task, none of them spent in the queue; None if nothing is known."""
        if task.status.ended:
            return None
        percent = self.progress_percent(task)
        estimate = self._speeds.estimate_s(task.job, self._engine.loaded if task is self._current else None)
        if task is self._current and percent >= 5 and task.started_at:
            return round((time.time() - task.started_at) * (100 - percent) / percent, 1)
        return None if estimate is None else round(estimate * (1 - percent / 100), 1)

    def estimated_wait_s(self) -> float | None:
        """Seconds until a task that is submitted now would start; None while some task ahead has no history."""
        ahead = [self.eta_s(task) for task in self.listing()]
        return None if None in ahead else round(sum(eta for eta in ahead if eta is not None), 1)

    # -- the runner

    async def _run(self) -> None:
        while task := await self._next():
            self._current = task
            try:
                await self._process(task)
            except Exception:  # a fault of one task must not end the queue
                log.exception("task %d could not be brought to its end", task.id)
            finally:
                self._current = None
                await self._announce()

    async def _next(self) -> Task | None:
        """The first waiting task, as soon as there is one and the queue is not paused; None when it is closed."""
        while not self._closed:
            if self._waiting and not self.paused:
                return self._waiting.pop(next(iter(self._waiting)))
            self._wake.clear()
            await self._wake.wait()
        return None

    async def _process(self, task: Task) -> None:
        task.status, task.started_at, task.attempts = Status.PROCESSING, time.time(), task.attempts + 1
        await self._journal.save(task)
        warm = self._engine.loaded == task.job.model
        try:
            result = await self._engine.run(task.id, task.job, self._catalog.get(task.job.model))
        except Cancelled:
            await self._stopped(task)
        except (EngineError, UnknownModel) as error:
            await asyncio.to_thread(self._files.remove_parts, task.id)
            await self._finish(task, Status.FAILED, getattr(error, "code", "unknown_model"), str(error))
        else:
            await self._completed(task, result, warm)
        await self._journal.prune(self._limits.history_count, self._limits.history_s)

    async def _completed(self, task: Task, result: Result, warm: bool) -> None:
        task.files, task.timings, task.peak_memory_bytes = result.files, result.timings, result.peak_memory_bytes
        self._speeds.learn(task.job, result, loaded=not warm)
        await self._journal.set_fact("speeds", self._speeds.facts())
        # A cancel that came after the last file was whole: "cancelling" was said, so "cancelled" must follow.
        await self._finish(task, Status.CANCELLED if task.status is Status.CANCELLING else Status.COMPLETED)

    async def _stopped(self, task: Task) -> None:
        """Its work has ended before its time: by a client, or by a shutdown that puts it back.

        A client keeps the files of earlier runs, each of them whole; a task that goes back will make them all again.
        """
        if task.id in self.interrupted and task.status is not Status.CANCELLING:
            await asyncio.to_thread(self._files.remove_attempt, task.id)
            task.status, task.started_at, task.attempts = Status.QUEUED, None, task.attempts - 1
            self._waiting = {task.id: task, **self._waiting}
            await self._journal.save(task)
            await self._journal.reorder(list(self._waiting))
        else:
            await asyncio.to_thread(self._files.remove_parts, task.id)
            await self._finish(task, Status.CANCELLED)

    async def _finish(self, task: Task, status: Status, code: str = "", sentence: str = "") -> None:
        self._end(task, status, code, sentence)
        log.info("task %d %s%s", task.id, status, f": {sentence}" if sentence else "")
        await self._journal.save(task)

    def _end(self, task: Task, status: Status, code: str = "", sentence: str = "") -> None:
        task.status, task.finished_at = status, time.time()
        if sentence:
            task.error = {"code": code, "message": sentence}

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()
