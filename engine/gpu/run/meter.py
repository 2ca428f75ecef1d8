"""The meter of one job: writes the board, adds up the time of each phase, counts steps, and notices a cancel."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from engine.catalog.models import Pipeline
from engine.job import Board, Cancelled, Job, Phase


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


@contextmanager
def counted_steps(
    pipe: Any, job: Job, pipeline: Pipeline, meter: Meter, after_step: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """Within the block the steps of one call are reported to `meter` and `after_step`; yields the arguments it needs.

    Steps are counted as shares of those that the job names: a class may take more (each section of a long video is
    denoised again) or fewer (a source that is partly kept).
    """
    numbers, sections = count(1), -(-job.frames // pipeline.section_frames) if pipeline.section_frames else 1

    def step_done(*_: Any) -> None:
        """Raises Cancelled: `pipe._interrupt` would still run the VAE."""
        known = int(getattr(pipe, "num_timesteps", None) or job.steps)  # not before the call has begun
        done = min(job.steps, next(numbers) * job.steps // (known * sections * pipeline.stages))
        meter.step_done(done)
        after_step(done)

    def counted(result: Any) -> Any:
        step_done()
        return result

    if pipeline.progress == "callback_on_step_end":
        yield {"callback_on_step_end": lambda _pipe, _step, _timestep, tensors: counted(tensors)}
    elif pipeline.progress == "callback":  # older classes
        yield {"callback": step_done, "callback_steps": 1}
    else:  # a class without a callback: each step of the scheduler is one
        scheduler, plain = pipe.scheduler, pipe.scheduler.step
        scheduler.step = lambda *arguments, **options: counted(plain(*arguments, **options))
        try:
            yield {}
        finally:
            del scheduler.step  # the instance's, which hides the class's
