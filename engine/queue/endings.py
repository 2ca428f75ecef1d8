"""How a running task ends: completed, failed, cancelled, or waiting again where the fault is not its own."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.files.outputs import Outputs
from engine.files.place import Place
from engine.job import DEVICE_FAULT, ENGINE_FAULTS, STORAGE_FAULT
from engine.queue.store import TaskStore
from engine.queue.tasks import Status, Task, ended, put_back, summary
from engine.workers.lanes import Lane

log = logging.getLogger("wangpd.queue")
PLACE_S = 2.0  # between two looks at folders that can't be used


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


class Endings:
    """Brings tasks to their end. Each method returns once that is committed, however long the disk needs."""

    def __init__(self, store: TaskStore, outputs: Outputs, place: Place, limits: Limits) -> None:
        self._store, self._outputs, self._place, self._limits = store, outputs, place, limits
        self.stopping = asyncio.Event()  # running tasks are to wait again: the daemon is shutting down
        self.kept = True  # files of ended tasks may still have to be published
        self._engine_faults: Counter[tuple[int, Lane]] = Counter()
        self._untidy: set[int] = set()  # tasks that have left files which could not be removed

    def cancelling(self, task_id: int) -> bool:
        """True if a client has cancelled this running task."""
        return self._store.started[task_id].status is Status.CANCELLING

    async def publish_kept(self) -> None:
        """Publish what ended tasks have left, if the place is well."""
        if self.kept and not await self._place.look():
            self.kept = bool(await self._publish())

    async def _publish(self, names: Sequence[str] | None = None) -> str:
        """Publish whole files, these or all; returns why one can't be published now, a sentence, else ""."""
        return await asyncio.to_thread(self._outputs.publish_kept, names)

    async def taken_up(self, task: Task) -> Task:
        """The new version of a task that ran when the daemon ended: saved, and its files removed."""
        await self._tidy(task.id)
        if task.status is Status.CANCELLING:
            task = ended(task, Status.CANCELLED)
        elif self._limits.on_restart == "fail":
            task = ended(task, Status.FAILED, "restarted", 'wangpd ended while this task ran; on_restart is "fail".')
        elif task.attempts >= (most := self._limits.max_attempts):
            sentence = f"wangpd ended {task.attempts} times while this task ran; max_attempts is {most}."
            task = ended(task, Status.FAILED, "too_many_attempts", sentence)
        else:
            task = put_back(task, task.attempts)
            if self._limits.on_restart == "pause":
                await self._store.pause(True)
        await self._store.journal.save(task)
        return task

    async def made(self, task_id: int, made: Mapping[str, Any] | None = None, **facts: Any) -> None:
        """Complete a task once its files are published; `made` is None if they were made in a former life.

        They are kept as long as that can't be done. If the daemon ends before, its next life goes on here.
        """
        changes = made or {}
        names = [file.filename for file in changes.get("files", self._store.started[task_id].files)]
        held = False
        while fault := await self._publish(names):
            held = True
            self._place.hold(fault)
            if changes:
                await self._store.insist(partial(self._store.keep, task_id, **changes))
            changes = {}
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), PLACE_S)
            if self.stopping.is_set():
                return
            if self.cancelling(task_id):
                self.kept = True
                break
        if held:
            self._place.hold("")
        if task_id in self._untidy:
            await self._tidy(task_id, names)

        def end(now: Task) -> Task:
            # A cancel that came after the last file was whole: `cancelling` was shown, so `cancelled` must follow.
            return ended(now, Status.CANCELLED if now.status is Status.CANCELLING else Status.COMPLETED, **changes)

        await self._settle(task_id, end, names, **facts)

    async def failed(self, lane: Lane, task_id: int, code: str, sentence: str) -> None:
        """End a task, unless the fault is its engine's or a disk's: then it waits until that is well again.

        What fails under this task alone, as a disk does that is smaller than its file, costs the attempt.
        """
        attempts, most = self._store.started[task_id].attempts, self._limits.max_attempts
        again: int | None = None  # attempts that count for it if it waits again
        if code in ENGINE_FAULTS:
            lane.fail(sentence)
            self._engine_faults[task_id, lane] += 1
            if self._engine_faults[task_id, lane] <= most:  # else the engine passes its checks: it is the task's fault
                again = attempts - 1
        elif code == DEVICE_FAULT:
            lane.suspect = True
            again = attempts if attempts < most else None
        elif code == STORAGE_FAULT:
            if await self._place.doubt():
                again = attempts - 1
            elif attempts < most:
                again = attempts
            self._place.hold(self._place.fault or sentence)
        if again is not None:
            log.error("task %d waits again: %s", task_id, sentence)
        await self._break_off(lane, task_id, again, code, sentence)

    async def stopped(self, lane: Lane, task_id: int) -> None:
        """End a task that a client cancelled, or put it back at a shutdown."""
        again = self._store.started[task_id].attempts - 1 if self.stopping.is_set() else None
        await self._break_off(lane, task_id, again)

    async def _break_off(self, lane: Lane, task_id: int, again: int | None, code: str = "", sentence: str = "") -> None:
        """End a task whose run was broken off, with those of its files that are whole.

        Or let it wait `again`, after so many attempts, and make all of them once more.
        """
        if self.cancelling(task_id):
            again = None
        files = tuple(lane.engine.made(task_id)) if again is None else ()
        names = [file.filename for file in files]
        await self._tidy(task_id, names)
        if files:
            self.kept |= bool(await self._publish(names))

        def end(now: Task) -> Task:
            if again is not None and now.status is Status.PROCESSING:  # else a client has cancelled it meanwhile
                return put_back(now, again)
            if not code or now.status is Status.CANCELLING:  # it was shown as such, so `cancelled` must follow
                return ended(now, Status.CANCELLED, files=files)
            return ended(now, Status.FAILED, code, sentence, files=files)

        await self._settle(task_id, end, names)

    async def _settle(self, task_id: int, end: Callable[[Task], Task], files: Sequence[str], **facts: Any) -> None:
        """Commit the end of a running task, and in the same commit which `files` it has left, and `facts`."""
        known = None if task_id in self._untidy else files  # what could not be removed is the daemon's own all the same
        if made := await asyncio.to_thread(self._outputs.made, task_id, known):
            facts["made"] = made
        task = await self._store.insist(lambda: self._store.settle(task_id, end, **facts))
        if task.status.ended or self.stopping.is_set():  # else the reason has been logged
            log.info("task %d %s", task_id, summary(task))

    async def _tidy(self, task_id: int, made: Sequence[str] = ()) -> None:
        """Delete the files of a broken attempt; one that can't be deleted must not cost the task its end."""
        self._untidy.discard(task_id)
        try:
            await asyncio.to_thread(self._outputs.remove_attempt, task_id, made)
        except OSError as error:
            self._untidy.add(task_id)
            log.warning("task %d: what it left in the output folder can't be removed now: %s", task_id, error)
