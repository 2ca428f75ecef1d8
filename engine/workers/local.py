"""The engine: one generation process behind `run_in_executor`, its board and its reports."""

import asyncio
import logging
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from engine import awake
from engine.catalog.models import Model
from engine.gpu import worker
from engine.job import (
    DEVICE_FAULT,
    GROUP_SIGNALS,
    NO_TASK,
    STALE_PROCESS,
    Board,
    Cancelled,
    EngineConfig,
    EngineError,
    Job,
    OutputFile,
    Phase,
    Result,
    fingerprint,
)
from engine.planning.machine import Machine
from engine.workers.lanes import Progress
from engine.workers.reports import Reports

log = logging.getLogger("wangpd.engine")
T = TypeVar("T")
LOADING_PATIENCE = 6  # times the patience of other phases
WATCH_S = 1.0  # how often the board is looked at for signs of life
CHECK_S = 60.0  # without a sign of life, for a process that starts and opens its device
NO_ENGINE = "engine_unavailable"
NO_PROCESS = "No generation process can be started: {}"


class _Spawn(SpawnContext):
    """Starts the process of one executor (a forked CUDA context is unusable), and keeps hold of it."""

    child: BaseProcess | None = None

    def Process(self, *arguments: Any, **options: Any) -> BaseProcess:  # type: ignore[override]
        self.child = SpawnContext.Process(*arguments, **options)
        return self.child


@contextmanager
def _signals_held() -> Iterator[None]:
    """Start processes within this: signals to the daemon's whole group reach them once they have left it, or never."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """A generation process with all that is its own: executor, board and reports, never shared with another one."""

    def __init__(self, config: EngineConfig, made: dict[int, list[OutputFile]]) -> None:
        """`made` gets the whole files of each task as they are reported."""
        self._context = _Spawn()
        self.board = self._context.RawValue(Board)
        ours, self._theirs = self._context.Pipe(duplex=False)
        self.reports = Reports(ours, made)
        arguments = self.board, self._theirs, config
        with _signals_held():  # multiprocessing's resource tracker is started here
            self._executor = ProcessPoolExecutor(1, self._context, worker.start, arguments)

    def call(self, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """Run `function` in the process, which is started by the first call. Raises BrokenProcessPool if it died."""
        with _signals_held():
            called = asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)
        self._theirs.close()  # the process has it now, and so the pipe ends with the process
        return called

    def kill(self) -> None:
        """End the process and whatever it started: it leads a group of its own, soon after it was started."""
        if self._context.child and (pid := self._context.child.pid):
            try:
                os.killpg(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self._context.child.kill()

    def discard(self, wait: bool) -> None:
        """End the process for good. With `wait`, it is gone afterwards."""
        self.reports.close()
        self.kill()
        self._executor.shutdown(wait=wait, cancel_futures=True)


@dataclass
class _Saving:
    """A job that is made, and whose files `worker` is writing."""

    worker: _Worker
    result: Result
    progress: Progress
    cancelled: bool


class Engine:
    """The Runner of this machine: works in a process that a fault, a cancel or `unload` may end at any moment."""

    def __init__(self, config: EngineConfig, cancel_grace_s: float = 10.0) -> None:
        self.device = " + ".join((config.device, *config.team))  # as configured
        self._config, self._grace_s = config, cancel_grace_s
        self._worker: _Worker | None = None
        self._task: int | None = None
        self._saving: dict[int, _Saving] = {}
        self._made: dict[int, list[OutputFile]] = {}  # whole files by task
        self._graces: set[asyncio.Task[None]] = set()
        self._hung_s: float | None = None  # how long the process that was ended had made no progress

    @property
    def _board(self) -> Board:
        return self._worker.board if self._worker else Board()

    async def run(
        self, task_id: int, job: Job, model: Model, patience_s: float = math.inf, free: Callable[[], object] = bool
    ) -> Result:
        """Run `job` to its end. `free` is called when the next one may be run: the files are still being written then.

        Raises EngineError, or Cancelled once the work has really stopped. A process that died, or made no progress for
        `patience_s` seconds and was ended, costs only this task, and one whose files it was still writing.
        """
        self.made(task_id)  # an earlier run's, which will be made once more
        result = await self._call(task_id, patience_s, worker.generate, task_id, job, model)
        if not result.pending or self._worker is None:
            return result
        runs = max(1, self._board.runs)
        progress = Progress(Phase.SAVING, runs - 1, runs, job.steps, job.steps)
        saving = _Saving(self._worker, result, progress, cancelled=self._board.cancel == task_id)
        self._saving[task_id] = saving
        try:
            free()
            return await self._saved(saving, task_id, patience_s)
        finally:
            del self._saving[task_id]
            self._discard_unused(saving.worker)

    async def _saved(self, saving: _Saving, task_id: int, patience_s: float) -> Result:
        """The result once its files are whole. After a cancel the last of them does not count."""
        since = time.monotonic()
        try:
            async with awake.timeout(patience_s):
                await saving.worker.reports.settled(saving.result.pending)
        except TimeoutError:
            saving.worker.kill()
            raise _hung(patience_s, "while saving") from None
        except EOFError:
            raise Cancelled if saving.cancelled else _died("while saving") from None
        if saving.cancelled:
            self._made[task_id].pop()
            raise Cancelled("while its files were written")
        timings = {**saving.result.timings, Phase.SAVING.label: time.monotonic() - since}
        return replace(saving.result, files=self.made(task_id), timings=timings, pending=0)

    def made(self, task_id: int) -> tuple[OutputFile, ...]:
        """The whole files of a task's latest run, also if that was broken off. The second call has none."""
        return tuple(self._made.pop(task_id, ()))

    async def load(self, model: Model) -> None:
        await self._call(NO_TASK, math.inf, worker.warm, model)

    async def check(self) -> None:
        await self._call(NO_TASK, CHECK_S, worker.check)

    async def _call(self, task_id: int, patience_s: float, function: Callable[..., T], *arguments: Any) -> T:
        fresh = self._worker is None
        try:
            used = self._worker = self._worker or _Worker(self._config, self._made)
        except OSError as error:  # no file is left for its pipe
            raise EngineError(NO_PROCESS.format(error.strerror), NO_ENGINE) from None
        self._task, used.board.cancel, self._hung_s = task_id, 0, None
        before = bytes(used.board)  # of an idle process, which may have done this task before
        watching = asyncio.create_task(self._watch(used, patience_s))
        try:
            return await used.call(function, *arguments)
        except BrokenProcessPool:
            used.reports.read()
            began = bytes(used.board) != before or self._hung_s is not None
            death = self._death(used.board, task_id)
            if began or isinstance(death, Cancelled):
                raise death from None
            if fresh:
                raise EngineError(NO_PROCESS.format("it died at its start; the log says more"), NO_ENGINE) from None
        except (OSError, RuntimeError) as error:  # no memory, process or file is left to start one with
            self._discard()
            raise EngineError(NO_PROCESS.format(error), NO_ENGINE) from None
        except EngineError as fault:
            if fault.code not in (DEVICE_FAULT, STALE_PROCESS):
                raise
            self._worker = None
            self._discard_unused(used)
            if fault.code == DEVICE_FAULT:
                raise
        finally:
            self._task = None
            watching.cancel()
            used.reports.read()  # what it has reported during the call is known after it
        log.warning("the generation process was not fit for work any more; another one is started")
        return await self._call(task_id, patience_s, function, *arguments)

    async def _watch(self, watched: _Worker, patience_s: float) -> None:
        """End the process if its board stays as it is for `patience_s` seconds."""
        seen, still = bytes(watched.board), awake.Wait()
        while still.spent_s <= self._patience_s(watched.board, patience_s):
            await still.go_on(min(WATCH_S, patience_s / 4))
            if (board := bytes(watched.board)) != seen:
                seen, still = board, awake.Wait()
        self._hung_s = still.spent_s
        self._kill(watched)

    def _patience_s(self, board: Board, patience_s: float) -> float:
        """More for what takes long and shows no progress: the start, loading, and a first step that compiles blocks."""
        if self._config.compile and board.phase == Phase.DENOISING and not board.step:
            return LOADING_PATIENCE * patience_s
        if board.phase not in (Phase.IDLE, Phase.LOADING):
            return patience_s
        return math.inf if self._config.allow_download else LOADING_PATIENCE * patience_s

    def loaded(self, model_id: str) -> bool:
        return self._board.loaded == fingerprint(model_id)

    @property
    def plan(self) -> str:
        return self._worker.reports.plan if self._worker and self._board.loaded else ""

    @property
    def machine(self) -> Machine | None:
        return self._worker.reports.machine if self._worker else None

    def _death(self, board: Board, task_id: int) -> Exception:
        """What the end of the process means for its task; the next run starts another."""
        self._discard()
        if board.cancel == task_id:
            return Cancelled("the generation process was ended")
        where = f"while {Phase(board.phase).label}" if board.task == task_id else "before it began"
        if board.phase == Phase.DENOISING:
            where += f", at step {board.step} of {board.total}"
        return _hung(self._hung_s, where) if self._hung_s else _died(where)

    def progress(self, task_id: int) -> Progress | None:
        if saving := self._saving.get(task_id):
            return saving.progress
        board = self._board
        if self._task != task_id or board.task != task_id:
            return None
        return Progress(Phase(board.phase), board.run, board.runs, board.step, board.total)

    def cancel(self, task_id: int) -> None:
        """End `task_id` if it runs: by the board within a step, or after the grace by ending its process.

        The process is not ended for the sake of files that are being written while it makes the next ones.
        """
        saving = self._saving.get(task_id)
        if saving and not saving.cancelled:
            saving.cancelled = True
        elif self._task == task_id and self._board.cancel != task_id:
            self._board.cancel = task_id
        else:
            return  # asked twice, the grace does not begin again
        grace = asyncio.create_task(self._kill_late(task_id))
        self._graces.add(grace)  # the event loop holds tasks by weak references only
        grace.add_done_callback(self._graces.discard)

    async def _kill_late(self, task_id: int) -> None:
        await awake.sleep(self._grace_s)
        saving = self._saving.get(task_id)
        if saving and (self._task is None or saving.worker is not self._worker):
            self._kill(saving.worker)
        elif self._worker and self._task == task_id:
            self._kill(self._worker)

    def _kill(self, process: _Worker) -> None:
        log.warning("the generation process of %s did not stop in time and is ended", self.device)
        process.kill()

    def _discard_unused(self, process: _Worker) -> None:
        """End a process that gets no more work, once it has written its files."""
        if process is not self._worker and all(saving.worker is not process for saving in self._saving.values()):
            process.discard(wait=False)

    def _discard(self, wait: bool = False) -> None:
        discarded, self._worker = self._worker, None
        if discarded:
            discarded.discard(wait)

    def unload(self) -> bool:
        """End the idle process, and with it give back all memory. False if there is none, or if it works."""
        if self._task is not None or self._saving or self._worker is None:
            return False
        self._discard()
        return True

    def close(self) -> None:
        """End the process, whatever it does, and wait until it is gone: for the daemon's own end. Blocks briefly."""
        self._discard(wait=True)  # else the pool's thread would find its pipes closed by the interpreter's end


def _hung(seconds: float, where: str) -> EngineError:
    return EngineError(
        f"The generation process made no progress for {seconds:.0f} s {where} and was ended. If the work is only slow,"
        " raise step_timeout_s in wangpd.toml.",
        "hung",
    )


def _died(where: str) -> EngineError:
    return EngineError(
        f"The generation process died {where}. Most often it ran out of memory: try a smaller resolution or"
        " video_length, and see the log.",
        "worker_died",
    )
