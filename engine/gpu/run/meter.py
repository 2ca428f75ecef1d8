"""The meter of one job: writes the board, adds up the time of each phase, and notices a cancel."""

import time
from collections import defaultdict

from engine.job import Board, Cancelled, Phase


class Meter:
    """Reports the progress of one job."""

    def __init__(self, board: Board, task_id: int) -> None:
        self._board, self._task_id = board, task_id
        self._seconds: dict[str, float] = defaultdict(float)
        self._entered = time.perf_counter()
        self._stepped, self._steps, self._steps_s, self._longest_s = 0.0, 0, 0.0, 0.0
        board.phase, board.run, board.runs, board.step, board.total = Phase.IDLE, 0, 0, 0, 0
        board.task = task_id  # last, so that the numbers above are never another task's

    def check(self) -> None:
        """Raises Cancelled if the daemon has asked for it."""
        if self._board.cancel == self._task_id:
            raise Cancelled

    def enter(self, phase: Phase) -> None:
        """Be in `phase` from now on, until another is entered. Raises Cancelled."""
        self.check()
        if phase != self._board.phase:
            self._stop_clock()
            self._board.phase = phase

    def _stop_clock(self) -> None:
        now = time.perf_counter()
        if self._board.phase != Phase.IDLE:
            self._seconds[self.where] += now - self._entered
        self._entered = now

    def begin_run(self, run: int, runs: int, steps: int) -> None:
        """Start pass `run` of `runs` through the pipeline, which will take `steps` denoising steps."""
        self._board.step, self._board.run, self._board.runs, self._board.total = 0, run, runs, steps

    def step_done(self, step: int) -> None:
        """Report that `step` denoising steps of this run are done. Raises Cancelled."""
        now, before = time.perf_counter(), self._board.step
        if before:  # not the first step of a run, in which kernels are chosen and compiled
            self._steps += step - before
            self._steps_s += now - self._stepped
            self._longest_s = max(self._longest_s, now - self._stepped)
        self._stepped, self._board.step = now, step
        self.check()

    @property
    def where(self) -> str:
        """The phase in words, for an error sentence."""
        return Phase(self._board.phase).label

    @property
    def step_s(self) -> float:
        """Seconds of a usual step; the first ones and the longest, which may have been slept through, do not count."""
        return (self._steps_s - self._longest_s) / (self._steps - 1) if self._steps > 1 else 0.0

    def done(self) -> dict[str, float]:
        """The job is over, however it ended; returns the seconds of each phase."""
        self._stop_clock()
        self._board.phase = Phase.IDLE
        return dict(self._seconds)
