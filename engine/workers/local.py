"""The engine: one generation process behind `run_in_executor`, and the board it shares with the daemon."""

import asyncio
import logging
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from engine.catalog.models import Model
from engine.gpu import worker
from engine.job import NO_TASK, Board, Cancelled, EngineConfig, EngineError, Job, OutputFile, Phase, Result, fingerprint
from engine.planning.machine import Machine

log = logging.getLogger("wangpd.engine")
T = TypeVar("T")
LOADING_PATIENCE = 6  # times the patience of other phases
WATCH_S = 1.0  # how often the board is looked at for progress
SAVED_S = 0.02  # and, at the longest, for files that are whole
SAVED_SHARE = 0.1  # of the time that they were waited for: more must not be lost by not looking
SPAWN = multiprocessing.get_context("spawn")  # a forked CUDA context is unusable


@dataclass(frozen=True)
class Progress:
    """How far the running job is: in `phase`, at `step` of `steps` denoising steps of pass `run` of `runs`."""

    phase: Phase
    run: int
    runs: int
    step: int
    steps: int


@dataclass
class _Saving:
    """A job that is made, and whose files are being written by the process of `board`."""

    board: Board
    result: Result
    progress: Progress
    cancelled: bool

    @property
    def settled(self) -> bool:
        """The files are written, or given up."""
        return self.board.saved >= self.result.pending

    def require_well(self) -> None:
        """Raises EngineError if they could not be written."""
        if self.board.unsaved == self.result.pending:
            raise EngineError(self.board.fault.decode(errors="replace"), "save_failed")


class Engine:
    """Runs one job at a time in a process of its own, which a fault, a cancel or `unload` may end at any moment.

    Executor and board are always replaced together: a board must never be written by two workers.
    """

    def __init__(self, config: EngineConfig, cancel_grace_s: float = 10.0) -> None:
        self._config = config
        self._grace_s = cancel_grace_s
        self._executor: ProcessPoolExecutor | None = None
        self._board = Board()
        self._task: int | None = None
        self._saving: dict[int, _Saving] = {}
        self._killing: asyncio.TimerHandle | None = None
        self._hung_s: float | None = None  # how long the process that was ended had made no progress

    async def run(
        self,
        task_id: int,
        job: Job,
        model: Model,
        patience_s: float = math.inf,
        free: Callable[[], object] = lambda: None,
    ) -> Result:
        """Run `job` to its end. `free` is called when the next one may be run: the files are still being written then.

        Raises EngineError with a sentence, or Cancelled once the work has really stopped. A process that died, or that
        made no progress for `patience_s` seconds and was ended, costs this task only, and one whose files it was still
        writing: the next run gets a fresh one.
        """
        result = await self._call(task_id, patience_s, worker.generate, task_id, job, model)
        if not result.pending:
            return result
        runs = max(1, self._board.runs)
        progress = Progress(Phase.SAVING, runs - 1, runs, job.steps, job.steps)
        saving = _Saving(self._board, result, progress, cancelled=self._board.cancel == task_id)
        self._saving[task_id] = saving
        try:
            free()
            return await self._saved(saving, patience_s)
        finally:
            del self._saving[task_id]

    async def _saved(self, saving: _Saving, patience_s: float) -> Result:
        """The result once its files are whole. Who cancels meanwhile wants the last one no more."""
        since = time.monotonic()
        while not saving.settled and self._lives(saving.board):
            await asyncio.sleep(saved_pause_s(time.monotonic() - since))
            if (waited_s := time.monotonic() - since) > patience_s:
                self._kill()
                raise _hung(waited_s, "while saving")
        if saving.cancelled:
            for file in saving.result.files[-1:]:
                (self._config.save_path / file.filename).unlink(missing_ok=True)
            raise Cancelled("while its files were written")
        if not saving.settled:
            raise _died("while saving")
        saving.require_well()
        timings = {**saving.result.timings, "saving": time.monotonic() - since}
        files = await asyncio.to_thread(self._whole, saving.result.files)
        return replace(saving.result, files=files, timings=timings, pending=0)

    def _lives(self, board: Board) -> bool:
        return any(child.pid == board.pid for child in multiprocessing.active_children())

    def _whole(self, files: Sequence[OutputFile]) -> tuple[OutputFile, ...]:
        """The files with their sizes; 0 for one that somebody has deleted already."""
        return tuple(replace(file, size_bytes=_size_bytes(self._config.save_path / file.filename)) for file in files)

    async def load(self, model: Model) -> None:
        """Make `model` warm. Raises EngineError."""
        await self._call(NO_TASK, math.inf, worker.warm, model)

    async def _call(self, task_id: int, patience_s: float, function: Callable[..., T], *arguments: Any) -> T:
        fresh, executor = self._executor is None, self._started()
        self._task, self._board.cancel, self._hung_s = task_id, 0, None
        watching = asyncio.create_task(self._watch(patience_s))
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
        except BrokenProcessPool:
            began = self._board.task == task_id or self._hung_s is not None
            death = self._death(task_id)
            if began or fresh or isinstance(death, Cancelled):
                raise death from None
        finally:
            self._task = None
            watching.cancel()
            self._stop_timer()
        log.warning("the generation process had died while it was idle; another one is started")
        return await self._call(task_id, patience_s, function, *arguments)

    async def _watch(self, patience_s: float) -> None:
        """End the process if its board stays as it is for `patience_s` seconds."""
        seen, since = bytes(self._board), time.monotonic()
        while True:
            await asyncio.sleep(min(WATCH_S, patience_s / 4))
            board, now = bytes(self._board), time.monotonic()
            if board != seen:
                seen, since = board, now
            elif now - since > self._patience_s(patience_s):
                self._hung_s = now - since
                self._kill()
                return

    def _patience_s(self, patience_s: float) -> float:
        """Loading shows no progress, and may read a hundred gigabytes from a slow disk, or fetch them.

        In the first step, blocks may be compiled.
        """
        if self._config.compile and self._board.phase == Phase.DENOISING and not self._board.step:
            return LOADING_PATIENCE * patience_s
        if self._board.phase != Phase.LOADING:
            return patience_s
        return math.inf if self._config.allow_download else LOADING_PATIENCE * patience_s

    def loaded(self, model_id: str) -> bool:
        """True if the process holds this model, so that a task of it loads nothing."""
        return self._board.loaded == fingerprint(model_id)

    @property
    def device(self) -> str:
        """Where it works, as configured."""
        return " + ".join((self._config.device, *self._config.team))

    @property
    def plan(self) -> str:
        """Where the weights of the loaded model lie, in a line; empty without one."""
        return self._board.plan.decode(errors="replace") if self._board.loaded else ""

    @property
    def machine(self) -> Machine | None:
        """What the process has measured of its device; None until then."""
        board = self._board
        if not board.flops_per_s:
            return None
        free = int(board.free_vram_bytes), int(board.free_ram_bytes)
        return Machine(*free, board.link_bytes_per_s, board.flops_per_s, cards=1 + len(self._config.team))

    def _started(self) -> ProcessPoolExecutor:
        if self._executor is None:
            shared = SPAWN.RawValue(Board)
            self._board = shared
            self._executor = ProcessPoolExecutor(
                max_workers=1, mp_context=SPAWN, initializer=worker.start, initargs=(shared, self._config)
            )
        return self._executor

    def _death(self, task_id: int) -> Exception:
        """What the end of the process means for its task; the next run starts another."""
        board, cancelled = self._board, self._board.cancel == task_id
        self._discard()
        if cancelled:
            return Cancelled("the generation process was ended")
        where = f"while {Phase(board.phase).name.lower()}" if board.task == task_id else "before it began"
        if board.phase == Phase.DENOISING:
            where += f", at step {board.step} of {board.total}"
        if self._hung_s:
            return _hung(self._hung_s, where)
        return _died(where)

    def progress(self, task_id: int) -> Progress | None:
        """How far `task_id` is, or None if it is not the one that runs."""
        board = self._board
        if saving := self._saving.get(task_id):
            return saving.progress
        if self._task != task_id or board.task != task_id:
            return None
        return Progress(Phase(board.phase), board.run, board.runs, board.step, board.total)

    def cancel(self, task_id: int) -> None:
        """End `task_id` if it runs: by the board within a step, or after the grace by ending its process.

        The process is not ended for the sake of files that are being written while it makes the next ones.
        """
        if (saving := self._saving.get(task_id)) and not saving.cancelled:
            saving.cancelled = True
            asyncio.get_running_loop().call_later(self._grace_s, self._kill_idle, task_id)
        if self._task == task_id and self._board.cancel != task_id:  # asked twice, the grace does not begin anew
            self._board.cancel = task_id
            self._stop_timer()
            self._killing = asyncio.get_running_loop().call_later(self._grace_s, self._kill)

    def _kill_idle(self, task_id: int) -> None:
        if task_id in self._saving and self._task is None:
            self._kill()

    def _stop_timer(self) -> None:
        if self._killing:
            self._killing.cancel()
            self._killing = None

    def _kill(self) -> None:
        pid = self._board.pid
        if pid:
            log.warning("the generation process (pid %d) did not stop in time and is ended", pid)
            end_group(pid)
        elif self._executor is not None:  # it is still being spawned and has not said its pid
            self._killing = asyncio.get_running_loop().call_later(0.1, self._kill)

    def _discard(self, wait: bool = False) -> None:
        """End the process and whatever it started; the next run starts another. With `wait`, it is gone afterwards."""
        executor, self._executor = self._executor, None
        pid, self._board = self._board.pid, Board()
        if pid:
            end_group(pid)
        if executor is not None:
            executor.shutdown(wait=wait, cancel_futures=True)

    def unload(self) -> bool:
        """End the idle process, and with it give back all memory. False if there is none, or if it works."""
        if self._task is not None or self._saving or self._executor is None:
            return False
        self._discard()
        return True

    def close(self) -> None:
        """End the process, whatever it does, and wait until it is gone: for the daemon's own end. Blocks briefly."""
        self._stop_timer()
        for child in multiprocessing.active_children():  # also one that is being spawned, and has not said its pid
            child.kill()
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


def saved_pause_s(waited_s: float) -> float:
    """Seconds until files are looked for again that were waited for this long: most are whole in some milliseconds."""
    return min(SAVED_S, max(0.001, SAVED_SHARE * waited_s))


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def end_group(pid: int) -> None:
    """Kill a worker and its ffmpeg: the worker leads a process group of its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
