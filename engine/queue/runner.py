"""The runner: starts waiting tasks on free lanes, and brings each to its end or back to those that wait."""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.catalog.models import Catalog, Model, UnknownModel
from engine.files.outputs import Outputs
from engine.job import NO_TASK, Cancelled, EngineError, Result
from engine.queue.facts import Facts
from engine.queue.journal import JournalFault
from engine.queue.progress import TaskClock, advanced
from engine.queue.store import TaskStore
from engine.queue.tasks import Status, Task, ended, put_back, summary
from engine.workers.lanes import ENGINE_FAULTS, Lane, Lanes

log = logging.getLogger("wangpd.queue")
READ_S = 0.2  # between two looks at the boards: at most 5 progress events a second and task


@dataclass(frozen=True)
class Limits:
    """The queue's part of the configuration."""

    max_queue: int = 1000
    max_attempts: int = 2
    on_restart: str = "resume"  # resume, pause, fail
    history_count: int = 10_000
    history_s: float = 30 * 24 * 3600
    step_timeout_s: float = 600.0
    idle_unload_s: float = 0.0  # 0: never


class QueueRunner:
    """One asyncio task that hands out work, one for each lane that does it, and one that reads the progress."""

    def __init__(
        self, store: TaskStore, lanes: Lanes, facts: Facts, *, catalog: Catalog, outputs: Outputs, limits: Limits
    ) -> None:
        self._store, self._lanes, self._facts = store, lanes, facts
        self._catalog, self._outputs, self._limits = catalog, outputs, limits
        self.closed = False  # shutting down: no new work is taken, and running tasks are to wait again
        self.wake = asyncio.Event()  # set when there may be something to do
        self.to_load: list[Model] = []  # one for each lane that is to load it
        self._at_work = asyncio.Event()  # set while tasks run
        self.clocks: dict[int, TaskClock] = {}  # of the tasks that run

    # -- life

    async def restore(self) -> None:
        """Let the tasks of the journal wait again; first those that ran when the daemon ended, by their start."""
        unfinished = await self._store.journal.unfinished()
        waiting = [task for task in unfinished if task.status is Status.QUEUED]
        broken = sorted((task for task in unfinished if task not in waiting), key=lambda task: task.started_at or 0)
        taken_up = [await self._taken_up(task) for task in broken]
        await self._store.restore([task for task in (*taken_up, *waiting) if not task.status.ended])

    async def _taken_up(self, task: Task) -> Task:
        """The new version of a task that ran when the daemon ended: saved, and its files removed."""
        await self._tidy(task.id, self._outputs.remove_attempt)
        if task.status is Status.CANCELLING:
            task = ended(task, Status.CANCELLED)
        elif self._limits.on_restart == "fail":
            task = ended(task, Status.FAILED, "restarted", 'wangpd ended while this task ran; on_restart is "fail".')
        elif task.attempts >= self._limits.max_attempts:
            most = self._limits.max_attempts
            sentence = f"wangpd ended {task.attempts} times while this task ran; max_attempts is {most}."
            task = ended(task, Status.FAILED, "too_many_attempts", sentence)
        else:
            task = put_back(task, task.attempts)
            if self._limits.on_restart == "pause":
                await self._store.pause(True)
        await self._store.journal.save(task)
        return task

    async def run(self) -> None:
        """Work until `interrupt`, then wait for the tasks that still run."""
        reading = asyncio.create_task(self._read_boards(), name="board reader")
        try:
            async with asyncio.TaskGroup() as group:  # at its end it waits for those that still run
                while not self.closed:
                    if work := await self._next():
                        group.create_task(work)
                    else:
                        await self._idle()
        finally:
            reading.cancel()

    def interrupt(self) -> None:
        """Take no new work, start none, and begin to stop the running tasks, which will be put back."""
        if not self.closed:
            self.closed = True
            self.wake.set()
            for task_id in (*self._store.started, NO_TASK):
                self._lanes.cancel(task_id)

    # -- what to do next

    async def _next(self) -> Coroutine[Any, Any, None] | None:
        """What a free lane is to do now: the first waiting task unless the queue is paused, or loading a model."""
        while (task := self._store.waiting.first) and not self._store.paused and not self.closed:
            lane = self._lanes.take(task, task.job.model)
            if lane is None:
                return None
            if await self._store.insist(partial(self._store.start, task)):
                self._at_work.set()
                return self._work(lane, task)
            lane.release(task)  # it was moved, removed or held back meanwhile
        lane = self._lanes.take(self.to_load[0], self.to_load[0].id) if self.to_load else None
        return self._load(lane, self.to_load.pop(0)) if lane else None

    async def _idle(self) -> None:
        """Wait for something to do; give the memory of a lane back when it takes too long."""
        self.wake.clear()
        idle_s = self._limits.idle_unload_s
        try:
            await asyncio.wait_for(self.wake.wait(), self._lanes.rest_s(idle_s))
        except TimeoutError:
            for device in self._lanes.unload_idle(idle_s or math.inf):
                log.info("%s: idle for %.0f s: the generation process was ended", device, idle_s)

    async def _read_boards(self) -> None:
        """Turn what the engines show into the progress of their tasks, as long as some run."""
        while True:
            if not self._store.started:
                self._at_work.clear()
            await self._at_work.wait()
            await asyncio.sleep(READ_S)
            await self._store.advance(self._looked_at)

    def _looked_at(self, task: Task) -> Task:
        shown = self._lanes.progress(task.id)
        if clock := self.clocks.get(task.id):
            clock.look(shown)
        return advanced(task, shown)

    async def _load(self, lane: Lane, model: Model) -> None:
        try:
            await lane.engine.load(model)
            lane.fault = ""
            await self._store.journal.save(**self._facts.used(lane.engine, model.id))
        except JournalFault as fault:
            log.warning("what was learnt while model %s was loaded could not be kept: %s", model.id, fault)
        except Exception as error:  # whatever it was, the queue goes on
            log.error("model %s could not be loaded: %s", model.id, error)
            if getattr(error, "code", "") in ENGINE_FAULTS:
                lane.fail(str(error))
        finally:
            self._release(lane, model)

    # -- the life of a task that runs

    async def _work(self, lane: Lane, task: Task) -> None:
        """Bring a task to its end, or back to those that wait. Its lane may be free before that."""
        try:
            await self._process(lane, task)
        except Exception:  # a fault of one task must not end the queue
            log.exception("task %d could not be brought to its end", task.id)
            self._store.forget(task.id)
        finally:
            self.clocks.pop(task.id, None)
            self._release(lane, task)
        try:  # only now: who waits for the task need not wait for this
            await self._store.journal.prune(self._limits.history_count, self._limits.history_s)
        except Exception as fault:  # whatever it was, the queue goes on, and the next task tries again
            log.warning("old tasks can't be forgotten now: %s", fault)

    def _release(self, lane: Lane, holder: Task | Model) -> None:
        """Let `lane` take the next task, though `holder` may not have ended yet."""
        lane.release(holder)
        self.wake.set()

    async def _process(self, lane: Lane, task: Task) -> None:
        warm = lane.engine.loaded(task.job.model)
        self.clocks[task.id] = TaskClock(warm)
        try:
            await asyncio.to_thread(self._outputs.prepare)
            model = self._catalog.get(task.job.model)
            if self.closed or self._cancelling(task.id):  # before the engine knew of it
                raise Cancelled
            patience_s = self._facts.patience_s(task.job, self._limits.step_timeout_s)
            result = await lane.engine.run(task.id, task.job, model, patience_s, partial(self._release, lane, task))
        except Cancelled:
            await self._stopped(task.id)
        except (EngineError, UnknownModel) as error:
            if (
                self.closed and getattr(error, "code", "") == "worker_died"
            ):  # what ends the daemon may end all processes
                return await self._stopped(task.id)
            await self._failed(lane, task.id, getattr(error, "code", "unknown_model"), str(error))
        except Exception as error:
            log.exception("task %d: fault in the daemon", task.id)
            sentence = f"{type(error).__name__} in the daemon; its log says more."
            await self._failed(lane, task.id, "internal_error", sentence)
        else:
            await self._completed(lane, task, result, warm)

    def _cancelling(self, task_id: int) -> bool:
        return self._store.started[task_id].status is Status.CANCELLING

    async def _completed(self, lane: Lane, task: Task, result: Result, warm: bool) -> None:
        lane.fault = ""
        facts = self._facts.used(lane.engine, task.job.model) | self._facts.learn(task.job, result, loaded=not warm)
        made = {name: getattr(result, name) for name in ("files", "timings", "plan", "peak_memory_bytes")}

        def end(now: Task) -> Task:
            # A cancel that came after the last file was whole: `cancelling` was shown, so `cancelled` must follow.
            return ended(now, Status.CANCELLED if now.status is Status.CANCELLING else Status.COMPLETED, **made)

        await self._settle(task.id, end, **facts)

    async def _failed(self, lane: Lane, task_id: int, code: str, sentence: str) -> None:
        """End the task, unless only this engine can't work: then it waits for another."""
        others = False
        if code in ENGINE_FAULTS:
            lane.fail(sentence)
            others = any(other is not lane for other in self._lanes.up())
        if others:
            log.error("%s takes no tasks for a while, others do: %s", lane.engine.device, sentence)
        await self._tidy(task_id, self._outputs.remove_parts)
        await self._settle(task_id, lambda now: ended(now, Status.FAILED, code, sentence), back=others)

    async def _stopped(self, task_id: int) -> None:
        """End a task that a client cancelled, or put it back at a shutdown.

        A client keeps the files of earlier runs, each of them whole; a task that goes back will make them all again.
        """
        back = self.closed and not self._cancelling(task_id)
        await self._tidy(task_id, self._outputs.remove_attempt if back else self._outputs.remove_parts)
        await self._settle(task_id, lambda now: ended(now, Status.CANCELLED), back=back)

    async def _settle(self, task_id: int, end: Callable[[Task], Task], *, back: bool = False, **facts: Any) -> None:
        """Commit the end of a running task, however long the disk needs; `facts` in the same commit.

        With `back`, it waits again, unless a client has cancelled it meanwhile.
        """

        def outcome(now: Task) -> Task:
            return put_back(now, now.attempts - 1) if back and now.status is Status.PROCESSING else end(now)

        task = await self._store.insist(lambda: self._store.settle(task_id, outcome, **facts))
        log.info("task %d %s", task_id, summary(task))

    async def _tidy(self, task_id: int, remove: Callable[[int], int]) -> None:
        """Delete the files of an attempt; one that can't be deleted must not cost the task its end."""
        try:
            await asyncio.to_thread(remove, task_id)
        except OSError as error:
            log.warning("task %d: what it left in the output folder can't be removed: %s", task_id, error)
