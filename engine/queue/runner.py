"""The task queue: an asyncio structure on the event loop, its states, and the runner that feeds the engines."""

import asyncio
import contextlib
import heapq
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from engine.catalog.models import Catalog, Model, UnknownModel
from engine.job import NO_TASK, Cancelled, EngineError, Job, Phase, Result
from engine.planning.machine import Machine
from engine.planning.work import Work
from engine.queue.journal import Journal, JournalFault, Reply
from engine.queue.speeds import Speeds
from engine.queue.tasks import Status, Task
from engine.workers.lanes import ENGINE_FAULTS, Lane, Lanes, Runner

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


SAVE_AGAIN_S = 5.0
FOLLOW_S = 0.2
SLOW_STEPS = 20  # usual denoising steps without progress that make a hang


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


class Files(Protocol):
    """What the queue needs of the output folder."""

    def remove_attempt(self, task_id: int) -> int:
        """Delete what a broken attempt of this task left, finished files too."""

    def remove_parts(self, task_id: int) -> int:
        """Delete what this task did not finish writing."""

    def prepare(self) -> None:
        """Make room for a task by the rules of retention. Raises EngineError if the disk is too full."""


@dataclass(frozen=True)
class Limits:
    """How much the queue holds and keeps, and what it does with work that a restart interrupted."""

    max_queue: int = 1000
    max_attempts: int = 2
    on_restart: str = "resume"  # resume, pause, fail
    history_count: int = 10_000
    history_s: float = 30 * 24 * 3600
    step_timeout_s: float = 600.0
    idle_unload_s: float = 0.0  # 0: never


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
        self,
        journal: Journal,
        engines: Sequence[Runner],
        catalog: Catalog,
        files: Files,
        limits: Limits | None = None,
    ) -> None:
        self._journal, self._catalog, self._files = journal, catalog, files
        self._lanes = Lanes(engines)
        self._limits = limits or Limits()
        self._speeds = Speeds({})
        self._machines: dict[str, Machine] = {}  # device → what was measured there
        self._waiting: dict[int, Task] = {}  # in order
        self._running: dict[int, Task] = {}  # in order of start; a lane may be free before its task has ended
        self._started: list[int] = []  # order of start of those that run, or that were put back and not moved since
        self._submitting = 0
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._closed = False
        self.paused = False
        self._journal_fault = ""
        self._runner: asyncio.Task[None]
        self._put_back = False  # running tasks are to wait again: the daemon is shutting down
        self._to_load: list[Model] = []  # one for each lane that shall load it
        self._last_model = ""  # id of the one that was last in use

    # -- life

    @contextlib.asynccontextmanager
    async def running(self, stop_s: float) -> AsyncIterator[None]:
        """Take up what the journal holds, run it and whatever is submitted, until the block ends.

        Then the running tasks are stopped within `stop_s` seconds and put back, as if they had never started.
        """
        await self._restore()
        self._runner = asyncio.create_task(self._run(), name="queue runner")
        try:
            yield
        finally:
            await self.stop(stop_s)

    async def _restore(self) -> None:
        self._speeds = Speeds(await self._journal.fact("speeds", {}))
        machines = await self._journal.fact("machines", {})
        self._machines = {device: Machine(**machine) for device, machine in machines.items()}
        self._last_model = await self._journal.fact("model", "")
        self.paused = await self._journal.fact("paused", False)
        unfinished = await self._journal.unfinished()
        started = [task for task in unfinished if task.status is not Status.QUEUED]
        started.sort(key=lambda task: task.started_at or 0)
        for task in started:
            await self._take_up(task)
        order = [task for task in (*started, *unfinished) if task.status is Status.QUEUED]
        self._waiting = {task.id: task for task in order}
        await self._journal.reorder(list(self._waiting))
        self._wake.set()

    async def _take_up(self, task: Task) -> None:
        """Decide what becomes of a task that was under way when the daemon ended."""
        await self._tidy(task, self._files.remove_attempt)
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
                await self.pause(True)
        await self._journal.save(task)

    async def stop(self, stop_s: float) -> None:
        """Take no new work, and stop the running tasks within `stop_s` seconds; they are put back then."""
        self.interrupt()
        await asyncio.wait([self._runner], timeout=stop_s)
        self._runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._runner

    @property
    def closed(self) -> bool:
        """No new work is taken."""
        return self._closed

    def close(self) -> None:
        """Take no new work and start none."""
        self._closed = True
        self._wake.set()

    def interrupt(self) -> None:
        """Take no new work, and begin to stop the running tasks, which will be put back."""
        self.close()
        if not self._put_back:
            self._put_back = True
            for task_id in (*self._running, NO_TASK):
                self._lanes.cancel(task_id)

    # -- what clients ask for

    async def submit(
        self, job: Job, warnings: Sequence[str] = (), *, key: str | None = None, request: str = ""
    ) -> Receipt:
        """Queue `job`. When this returns, it is on the disk.

        Raises Closed, Full, EngineDown, JournalFault, or KeyReused if `key` was used for a request with another digest.
        """
        self.require_open()
        answer = {
            "position": len(self._waiting) + self._submitting + len(self._running) + 1,
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
            return self._replayed(stored.reply, request)
        self._waiting[task.id] = task
        self._wake.set()
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
        if self._closed:
            raise Closed("wangpd is shutting down and takes no new work")
        if len(self._waiting) + self._submitting >= self._limits.max_queue:
            raise Full(f"The queue is full: {self._limits.max_queue} tasks wait (max_queue)")
        if not self._lanes.up():
            raise EngineDown(self._lanes.fault)

    async def get(self, task_id: int) -> Task:
        """The task with this id, ended or not. Raises NoSuchTask."""
        task = self.active(task_id) or await self._journal.get(task_id)
        if task is None:
            raise NoSuchTask(f"Task {task_id} not found")
        return task

    def active(self, task_id: int) -> Task | None:
        """The task with this id if it has not ended."""
        return self._running.get(task_id) or self._waiting.get(task_id)

    def listing(self) -> list[Task]:
        """The tasks that have not ended: those that run, then those that wait, in their order."""
        return [*self.at_work, *self._waiting.values()]

    @property
    def at_work(self) -> list[Task]:
        """The tasks that run, in the order in which they started."""
        return [task for task in self._running.values() if not task.status.ended]

    @property
    def current(self) -> Task | None:
        """The task that runs; of several, the one that started first."""
        return next(iter(self.at_work), None)

    async def remove(self, task_id: int) -> Status:
        """Take a waiting task out, or begin to cancel a running one; returns its new status.

        Raises NoSuchTask, or WrongState if it has ended.
        """
        if task := self._waiting.get(task_id):
            await self._drop([task])
            return task.status
        task = await self.get(task_id)
        if task.status.ended:
            raise WrongState(f"Task {task_id} has already ended ({task.status}); there is nothing to remove")
        if task_id not in self._running:
            return await self.remove(task_id)  # it went back to waiting while the journal was asked
        task.status = Status.CANCELLING
        self._lanes.cancel(task_id)
        await self._journal.save(task)
        return Status.CANCELLING  # it may have ended by now: what was asked for is told, and the status says the rest

    async def clear(self) -> int:
        """Take out all waiting tasks and return how many there were; those that run go on."""
        removed = list(self._waiting.values())
        await self._drop(removed)
        return len(removed)

    async def _drop(self, tasks: Sequence[Task]) -> None:
        """Take waiting tasks out; if that can't be written down, they wait as before. Raises JournalFault."""
        order = list(self._waiting)
        for task in tasks:
            del self._waiting[task.id]
            self._end(task, Status.CANCELLED)
        try:
            await self._journal.save(*tasks)
        except JournalFault:
            for task in tasks:
                task.status, task.finished_at = Status.QUEUED, None
                self._waiting[task.id] = task
            self._arrange(order)
            raise
        await self._announce()

    def _arrange(self, order: Sequence[int]) -> None:
        """Let those of `order` that still wait do so in this order, before whatever else waits."""
        first = {task_id: self._waiting[task_id] for task_id in order if task_id in self._waiting}
        self._waiting = first | self._waiting

    async def pause(self, paused: bool) -> None:
        """Start no waiting task, or start them again; remembered over a restart. Running tasks go on."""
        await self._journal.set_fact("paused", paused)
        self.paused = paused
        self._wake.set()

    async def move(self, task_id: int, position: int) -> int:
        """Put a waiting task at `position` and return where it is: never before those that run, or past the end.

        Raises NoSuchTask, WrongState if it does not wait, or JournalFault, and then it is where it was.
        """
        if task_id not in self._waiting:
            task = await self.get(task_id)
            raise WrongState(f"Task {task_id} is {task.status}; only a waiting task can be moved")
        before, ahead = list(self._waiting), 1 + len(self._running)
        others = [other for other in before if other != task_id]
        place = min(max(position - ahead, 0), len(others))
        self._arrange([*others[:place], task_id, *others[place:]])
        try:
            await self._journal.reorder(list(self._waiting))
        except JournalFault:
            self._arrange(before)
            raise
        self._started = [other for other in self._started if other != task_id]
        return place + ahead

    async def retry(self, task_id: int) -> Receipt:
        """Queue the job of an ended task again, with its settings, seed and pictures.

        Raises NoSuchTask, or WrongState if it has not ended; and what `submit` raises.
        """
        task = await self.get(task_id)
        if not task.status.ended:
            raise WrongState(f"Task {task_id} is {task.status}; only an ended task can be retried")
        return await self.submit(task.job, task.warnings)

    async def history(self, status: Status | None, limit: int, offset: int) -> tuple[list[Task], int]:
        """A page of all tasks, newest first, and how many there are."""
        tasks, total = await self._journal.history(status, limit, offset)
        return [self.active(task.id) or task for task in tasks], total

    def load(self, model: Model) -> bool:
        """Make `model` warm as soon as an engine is free; True if it is already."""
        if self._lanes.loaded(model.id):
            return True
        self._to_load = [model]
        self._wake.set()
        return False

    def warm_up(self, model: Model) -> None:
        """Make `model` warm in every lane; not while tasks wait, for they bring their own."""
        if self.paused or not self._waiting:
            self._to_load = [model] * len(self._lanes)
            self._wake.set()

    def unload(self) -> bool:
        """Give back all memory of the cards; False if there was nothing to give. Raises Busy if an engine works."""
        if self._running or self._lanes.busy:
            raise Busy("The engine works; wait for the task, or cancel it first")
        return self._lanes.unload()

    async def wait(self, task_id: int, timeout_s: float) -> Task:
        """The task once it has ended, or as it is after `timeout_s`. Raises NoSuchTask."""
        ran: Task | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                while self.active(task_id):
                    ran = self._running.get(task_id)  # which it leaves with its end on the disk
                    await self._changed.wait()
        return ran if ran and ran.status.ended and not self.active(task_id) else await self.get(task_id)

    # -- what it looks like from outside

    def position(self, task: Task) -> int | None:
        """1 for a task that runs or is next, the others count on from those that run; None once it has ended."""
        if task.status.ended:
            return None
        if task.id in self._running:
            return 1
        places = {task_id: place for place, task_id in enumerate(self._waiting, start=1)}
        place = places.get(task.id)
        return place and place + len(self._running)

    def steps_done(self, task: Task) -> tuple[int, int]:
        """Denoising steps done and to do, over all runs of the task; the first only grows."""
        total = task.job.steps * self._runs(task.job)
        if task.status is Status.COMPLETED:
            return total, total
        if progress := self._lanes.progress(task.id):
            task.steps_done = max(task.steps_done, progress.run * progress.steps + progress.step)
        return task.steps_done, total

    def _runs(self, job: Job) -> int:
        """Passes through the pipeline; the files of a batch are made in one, where the class can."""
        model = self._catalog.get(job.model) if job.model in self._catalog else None
        if model and job.task in model.pipelines:
            return Work.of(model, job).runs
        return job.repeat_generation * job.batch_size

    def progress_percent(self, task: Task) -> float:
        """0 to 100; it only grows, and is 100 once the task is completed."""
        if task.status is Status.COMPLETED:
            return 100.0
        progress = self._lanes.progress(task.id)
        if progress and progress.runs:
            start, share = SHARES[progress.phase]
            part = progress.step / progress.steps if progress.phase is Phase.DENOISING and progress.steps else 0.0
            percent = round(min(99.9, 100 * (progress.run + start + share * part) / progress.runs), 1)
            task.progress = max(task.progress, percent)  # a retry begins anew, and the last phase is over early
        return task.progress

    def phase(self, task: Task) -> str | None:
        """`loading`, `encoding` … while the task runs."""
        progress = self._lanes.progress(task.id)
        return progress.phase.name.lower() if progress and progress.phase else None

    def eta_s(self, task: Task) -> float | None:
        """Seconds of work still ahead of this task, none of them spent in the queue; None if nothing is known."""
        if task.status.ended:
            return None
        percent = self.progress_percent(task)
        estimate = self.estimate_s(task.job)
        if task.id in self._running and percent >= 5 and task.started_at:
            return round((time.time() - task.started_at) * (100 - percent) / percent, 1)
        return None if estimate is None else round(estimate * (1 - percent / 100), 1)

    def estimate_s(self, job: Job) -> float | None:
        """Seconds of its own work that `job` will take; None if nothing is known."""
        estimate = self._speeds.estimate_s(job, self._lanes.loaded(job.model))
        return None if estimate is None else round(estimate, 1)

    def estimated_wait_s(self) -> float | None:
        """Seconds until a task that is submitted now would start; None if a task without history decides it."""
        free_at = [0.0] * (len(self._lanes.up()) or len(self._lanes))
        for task in self.listing():
            eta = self.eta_s(task)
            heapq.heapreplace(free_at, free_at[0] + (math.inf if eta is None else eta))
        return None if math.isinf(free_at[0]) else round(free_at[0], 1)

    @property
    def faults(self) -> dict[str, str]:
        """What keeps the queue from working now, a sentence each."""
        found = {"journal": self._journal_fault, "engine": self._lanes.fault}
        return {name: sentence for name, sentence in found.items() if sentence}

    def remarks(self) -> list[str]:
        """What keeps some of the engines from working, a sentence each, while others do."""
        return self._lanes.remarks()

    def loaded(self, model_id: str) -> bool:
        """True if a model is warm: a task of it loads nothing where it is."""
        return self._lanes.loaded(model_id)

    @property
    def last_model(self) -> str:
        """Id of the model that was last in use, also before a restart; empty if there was none."""
        return self._last_model

    @property
    def plans(self) -> list[str]:
        """Where the weights of each warm model lie, in a line."""
        return [lane.engine.plan for lane in self._lanes if lane.engine.plan]

    @property
    def machines(self) -> list[Machine]:
        """What was ever measured of the devices in use."""
        return [self._machines[lane.engine.device] for lane in self._lanes if lane.engine.device in self._machines]

    # -- the runner

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:  # at its end it waits for those that still run
            while not self._closed:
                if work := self._next():
                    group.create_task(work)
                else:
                    await self._idle()

    def _next(self) -> Coroutine[Any, Any, None] | None:
        """What a free lane shall do now: the first waiting task unless the queue is paused, or make a model warm."""
        if self._waiting and not self.paused:
            task = next(iter(self._waiting.values()))
            lane = self._lanes.take(task, task.job.model)
            return self._work(lane, self._taken(task)) if lane else None
        if self._to_load:
            model = self._to_load[0]
            lane = self._lanes.take(model, model.id)
            return self._load(lane, self._to_load.pop(0)) if lane else None
        return None

    def _taken(self, task: Task) -> Task:
        """Let a waiting task be one that runs."""
        del self._waiting[task.id]
        self._started = [*(other for other in self._started if other in self._running), task.id]
        self._running[task.id] = task
        return task

    async def _work(self, lane: Lane, task: Task) -> None:
        """Bring a task to its end, or back to those that wait. Its lane is free by then, at times before it."""
        try:
            await self._process(lane, task)
        except Exception:  # a fault of one task must not end the queue
            log.exception("task %d could not be brought to its end", task.id)
            self._running.pop(task.id, None)
        else:
            if task.status.ended:  # else it was put back, and may run in another lane by now
                self._running.pop(task.id, None)
        finally:
            self._release(lane, task)
            await self._announce()
        await self._prune()  # only now: who waits for the task need not wait for this

    async def _prune(self) -> None:
        """Forget tasks by the rules of retention; if that can't be done now, then after the next one."""
        try:
            await self._journal.prune(self._limits.history_count, self._limits.history_s)
        except Exception as fault:  # whatever it was, the queue goes on
            log.warning("old tasks can't be forgotten now: %s", fault)

    def _release(self, lane: Lane, holder: Task | Model) -> None:
        """Let `lane` take the next task, though `holder` may not have come to its end yet."""
        lane.release(holder)
        self._wake.set()

    async def _load(self, lane: Lane, model: Model) -> None:
        try:
            await lane.engine.load(model)
            lane.fault = ""
            await self._remember(lane, model.id)
        except Exception as error:  # whatever it was, the queue goes on
            log.error("model %s could not be loaded: %s", model.id, error)
            if getattr(error, "code", "") in ENGINE_FAULTS:
                lane.fail(str(error))
        finally:
            self._release(lane, model)

    async def _idle(self) -> None:
        """Wait for something to do; give the memory of a lane back when it takes too long."""
        self._wake.clear()
        idle_s = self._limits.idle_unload_s
        try:
            await asyncio.wait_for(self._wake.wait(), self._lanes.rest_s(idle_s))
        except TimeoutError:
            for device in self._lanes.unload_idle(idle_s or math.inf):
                log.info("%s: idle for %.0f s: the generation process was ended", device, idle_s)

    async def _process(self, lane: Lane, task: Task) -> None:
        task.status, task.started_at, task.attempts = Status.PROCESSING, time.time(), task.attempts + 1
        task.progress, task.steps_done = 0.0, 0
        await self._persist(task)
        warm = lane.engine.loaded(task.job.model)
        try:
            await asyncio.to_thread(self._files.prepare)
            model = self._catalog.get(task.job.model)
            if task.status is Status.CANCELLING or self._put_back:  # before the engine knew of it
                raise Cancelled
            result = await self._run_followed(lane, task, model)
        except Cancelled:
            await self._stopped(task)
        except (EngineError, UnknownModel) as error:
            await self._failed(lane, task, getattr(error, "code", "unknown_model"), str(error))
        except Exception as error:
            log.exception("task %d: fault in the daemon", task.id)
            sentence = f"{type(error).__name__} in the daemon; its log says more."
            await self._failed(lane, task, "internal_error", sentence)
        else:
            await self._completed(lane, task, result, warm)

    async def _run_followed(self, lane: Lane, task: Task, model: Model) -> Result:
        """Run it, and keep in the task how far it got: the engine forgets with the end."""
        following = asyncio.create_task(self._follow(task))
        try:
            free = partial(self._release, lane, task)
            return await lane.engine.run(task.id, task.job, model, self._patience_s(task.job), free)
        finally:
            following.cancel()

    async def _follow(self, task: Task) -> None:
        while True:
            self.progress_percent(task)
            self.steps_done(task)
            await asyncio.sleep(FOLLOW_S)

    async def _failed(self, lane: Lane, task: Task, code: str, sentence: str) -> None:
        if code in ENGINE_FAULTS:
            lane.fail(sentence)
            others = [other for other in self._lanes.up() if other is not lane]
            if others and task.status is not Status.CANCELLING:
                log.error("%s takes no tasks for a while, others do: %s", lane.engine.device, sentence)
                await self._wait_again(task)
                return
        await self._tidy(task, self._files.remove_parts)
        await self._finish(task, Status.FAILED, code, sentence)

    async def _tidy(self, task: Task, remove: Callable[[int], int]) -> None:
        """Delete what an attempt left. A file that stays is a nuisance; a task without its end would be a fault."""
        try:
            await asyncio.to_thread(remove, task.id)
        except OSError as error:
            log.warning("task %d: what it left in the output folder can't be removed: %s", task.id, error)

    def _patience_s(self, job: Job) -> float:
        """How long a job may show no progress: slow models earn more than the floor by what they have shown before."""
        return max(self._limits.step_timeout_s, SLOW_STEPS * self._speeds.step_s(job))

    async def _completed(self, lane: Lane, task: Task, result: Result, warm: bool) -> None:
        task.files, task.timings, task.plan = result.files, result.timings, result.plan
        task.peak_memory_bytes = result.peak_memory_bytes
        lane.fault = ""
        facts = self._learnt(task, result, warm)
        await self._remember(lane, task.job.model)
        # A cancel that came after the last file was whole: "cancelling" was said, so "cancelled" must follow.
        status = Status.CANCELLED if task.status is Status.CANCELLING else Status.COMPLETED
        await self._finish(task, status, **facts)

    def _learnt(self, task: Task, result: Result, warm: bool) -> dict[str, Any]:
        """What the journal shall know of speeds from now on, or nothing."""
        try:
            self._speeds.learn(task.job, result, loaded=not warm)
            return {"speeds": self._speeds.facts()}
        except Exception:  # an estimate is no promise: it must not cost a task its end
            log.warning("task %d: its times could not be kept", task.id, exc_info=True)
            return {}

    async def _remember(self, lane: Lane, model_id: str) -> None:
        """Keep what a later start will want to know: the model in use, and what its process measured."""
        machine, device = lane.engine.machine, lane.engine.device
        try:
            if model_id != self._last_model:
                self._last_model = model_id
                await self._journal.set_fact("model", model_id)
            if machine and machine != self._machines.get(device):
                self._machines[device] = machine
                facts = {name: vars(known) for name, known in self._machines.items()}
                await self._journal.set_fact("machines", facts)
        except JournalFault:  # as with the times
            log.warning("what %s measured could not be kept", device, exc_info=True)

    async def _stopped(self, task: Task) -> None:
        """Its work has ended before its time: by a client, or by a shutdown that puts it back.

        A client keeps the files of earlier runs, each of them whole; a task that goes back will make them all again.
        """
        back = self._put_back and task.status is not Status.CANCELLING
        await self._tidy(task, self._files.remove_attempt if back else self._files.remove_parts)
        if not back or task.status is Status.CANCELLING:  # a client may have cancelled it meanwhile
            await self._finish(task, Status.CANCELLED)
            return
        await self._wait_again(task)

    async def _wait_again(self, task: Task) -> None:
        """Put a running task back before all that wait, as if it had never started; those before it stay before it."""
        task.status, task.started_at, task.attempts = Status.QUEUED, None, task.attempts - 1
        del self._running[task.id]
        self._waiting[task.id] = task
        self._arrange(self._started)
        await self._persist(task)
        with contextlib.suppress(JournalFault):  # a task that ran comes first in any case
            await self._journal.reorder(list(self._waiting))

    async def _finish(self, task: Task, status: Status, code: str = "", sentence: str = "", **facts: Any) -> None:
        """Let it have ended, and store `facts` with that: each commit waits for the disk."""
        self._end(task, status, code, sentence)
        log.info("task %d %s%s", task.id, status, f": {sentence}" if sentence else "")
        await self._persist(task, **facts)

    async def _persist(self, task: Task, **facts: Any) -> None:
        """Save it, however long the disk needs: a state that only the memory knows is a promise that may be broken."""
        while True:
            try:
                await self._journal.save(task, **facts)
                self._journal_fault = ""
                return
            except JournalFault as fault:
                self._journal_fault = str(fault)
                log.error("task %d: %s", task.id, fault)
                await asyncio.sleep(SAVE_AGAIN_S)

    def _end(self, task: Task, status: Status, code: str = "", sentence: str = "") -> None:
        task.status, task.finished_at = status, time.time()
        if sentence:
            task.error = {"code": code, "message": sentence}

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()
