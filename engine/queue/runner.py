"""The runner: starts waiting tasks on free lanes, and brings each to its end or back to those that wait."""

import asyncio
import logging
import math
from collections.abc import Coroutine
from functools import partial
from typing import Any

from engine.admission import BadRequest, require_files
from engine.catalog.models import Model, UnknownModel
from engine.files.outputs import Outputs
from engine.files.place import Place
from engine.job import ENGINE_FAULTS, NO_TASK, Cancelled, EngineError, Result
from engine.queue.endings import PLACE_S, Endings, Limits
from engine.queue.facts import Facts
from engine.queue.journal import JournalFault
from engine.queue.progress import TaskClock, advanced
from engine.queue.store import TaskStore
from engine.queue.tasks import Status, Task
from engine.workers.lanes import Lane, Lanes

log = logging.getLogger("wangpd.queue")
READ_S = 0.2  # between two looks at the boards: at most 5 progress events a second and task


class QueueRunner:
    """One asyncio task that hands out work, and for each lane one that does it and one that reads the progress."""

    def __init__(
        self, store: TaskStore, lanes: Lanes, facts: Facts, *, place: Place, outputs: Outputs, limits: Limits
    ) -> None:
        self._store, self._lanes, self._facts = store, lanes, facts
        self._place, self._outputs, self._limits = place, outputs, limits
        self._endings = Endings(store, outputs, place, limits)
        self.closed = False  # shutting down: no new work is taken, and running tasks are to wait again
        self.wake = store.wake
        self.to_load: list[Model] = []  # one for each lane that is to load it
        self.clocks: dict[int, TaskClock] = {}  # of the tasks that run

    async def restore(self) -> None:
        """Let the tasks of the journal wait again; first those that ran when the daemon ended, by their start.

        Those whose files are made, and could not be published until then, only need that.
        """
        unfinished = await self._store.journal.unfinished()
        waiting = [task for task in unfinished if task.status is Status.QUEUED]
        started = [task for task in unfinished if task.status is not Status.QUEUED]
        broken = sorted((task for task in started if not task.files), key=lambda task: task.started_at or 0)
        taken_up = [await self._endings.taken_up(task) for task in broken]
        order = [task for task in (*taken_up, *waiting) if not task.status.ended]
        await self._store.restore(order, started=[task for task in started if task.files])

    async def run(self) -> None:
        """Work until `interrupt`, then wait for the tasks that still run."""
        async with asyncio.TaskGroup() as group:
            for task in self._store.at_work:
                group.create_task(self._endings.made(task.id))
            while not self.closed:
                self.wake.clear()  # before the look: what happens during it is looked at next
                if work := await self._next():
                    group.create_task(work)
                else:
                    await self._idle()

    def interrupt(self) -> None:
        """Take no new work, start none, and begin to stop the running tasks, which will be put back."""
        if not self.closed:
            self.closed = True
            self.wake.set()
            self._endings.stopping.set()
            for task_id in (*self._store.started, NO_TASK):
                self._lanes.cancel(task_id)

    async def _next(self) -> Coroutine[Any, Any, None] | None:
        """What a free lane is to do now: be checked, run the first waiting task, or load a model; None if nothing."""
        if lane := self._lanes.take_to_check():
            return self._check(lane)
        await self._endings.publish_kept()
        while (task := self._store.waiting.first) and not self._store.paused and not self.closed:
            lane = self._lanes.take(task, task.job.model)
            if lane is None:
                return None
            if await self._place.look():
                await self._retire()  # which may make room
                await self._place.look()
            if not self._place.fault and await self._store.insist(partial(self._store.start, task)):
                return self._work(lane, task)
            lane.release(task)  # the place is not well, or it was moved, removed or held back meanwhile
            if self._place.fault:
                break
        lane = self._lanes.take(self.to_load[0], self.to_load[0].id) if self.to_load else None
        return self._load(lane, self.to_load.pop(0)) if lane else None

    async def _retire(self) -> None:
        """Delete the files that are no longer to be kept; what can't be deleted now waits for the next task."""
        if self._outputs.keeps_all:
            return
        journal = self._store.journal
        try:
            gone = await asyncio.to_thread(self._outputs.prepare, await journal.files())
            await journal.disown(gone)
        except (OSError, JournalFault) as fault:
            log.warning("old files can't be deleted now: %s", fault)

    async def _idle(self) -> None:
        """Wait for something to do; give the memory of a lane back when it takes too long."""
        idle_s = self._limits.idle_unload_s
        rest_s = self._lanes.rest_s(idle_s)
        if self._endings.kept or (self._place.fault and self._store.waiting.first):
            rest_s = min(PLACE_S, math.inf if rest_s is None else rest_s)
        try:
            await asyncio.wait_for(self.wake.wait(), rest_s)
        except TimeoutError:
            for device in self._lanes.unload_idle(idle_s or math.inf):
                log.info("%s: idle for %.0f s: the generation process was ended", device, idle_s)

    async def _check(self, lane: Lane) -> None:
        try:
            await lane.engine.check()
        except Exception as error:  # whatever it was, the queue goes on
            lane.fail(str(error))
        else:
            lane.recover()
        finally:
            self._release(lane, lane)

    async def _load(self, lane: Lane, model: Model) -> None:
        try:
            await lane.engine.load(model)
            await self._store.journal.save(**self._facts.used(lane.engine, model.id))
        except JournalFault as fault:
            log.warning("what was learnt while model %s was loaded could not be kept: %s", model.id, fault)
        except Exception as error:  # whatever it was, the queue goes on
            log.error("model %s could not be loaded: %s", model.id, error)
            if getattr(error, "code", "") in ENGINE_FAULTS:
                lane.fail(str(error))
        finally:
            self._release(lane, model)

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

    def _release(self, lane: Lane, holder: object) -> None:
        """Let `lane` take the next task, though `holder` may not have ended yet."""
        lane.release(holder)
        self.wake.set()

    async def _process(self, lane: Lane, task: Task) -> None:
        warm = lane.engine.loaded(task.job.model)
        self.clocks[task.id] = TaskClock(warm)
        try:
            await self._retire()
            model = self._facts.catalog.get(task.job.model)
            await asyncio.to_thread(require_files, task.job)
            if self._endings.stopping.is_set() or self._endings.cancelling(task.id):  # before the engine knew of it
                raise Cancelled
            result = await self._run(lane, task, model)
        except Cancelled:
            await self._endings.stopped(lane, task.id)
        except (EngineError, UnknownModel, BadRequest) as error:
            code = getattr(error, "code", "unknown_model" if isinstance(error, UnknownModel) else "file_gone")
            if self.closed and code == "worker_died":  # what ends the daemon may end all processes
                return await self._endings.stopped(lane, task.id)
            await self._endings.failed(lane, task.id, code, str(error))
        except Exception as error:
            log.exception("task %d: fault in the daemon", task.id)
            sentence = f"{type(error).__name__} in the daemon; its log says more."
            await self._endings.failed(lane, task.id, "internal_error", sentence)
        else:
            facts = self._facts.used(lane.engine, task.job.model) | self._facts.learn(task.job, result, loaded=not warm)
            made = {name: getattr(result, name) for name in ("files", "timings", "plan", "peak_memory_bytes")}
            await self._endings.made(task.id, made, **facts)

    async def _run(self, lane: Lane, task: Task, model: Model) -> Result:
        """Let an engine make the files of a task, and show meanwhile how far it is. Raises EngineError or Cancelled."""
        watching = asyncio.create_task(self._watch(lane, task.id), name=f"progress of task {task.id}")
        try:
            patience_s = self._facts.patience_s(task.job, self._limits.step_timeout_s)
            return await lane.engine.run(task.id, task.job, model, patience_s, partial(self._release, lane, task))
        finally:
            watching.cancel()

    async def _watch(self, lane: Lane, task_id: int) -> None:
        while True:
            await asyncio.sleep(READ_S)
            shown = lane.engine.progress(task_id)
            self.clocks[task_id].look(shown)
            await self._store.advance(task_id, partial(advanced, progress=shown))
