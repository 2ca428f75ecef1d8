"""Counting denoising steps, whichever way a pipeline tells of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from engine.catalog.models import Pipeline
from engine.gpu.run.meter import Meter
from engine.job import Job


class StepCounter:
    """Reports the steps of one call to the meter, as shares of the steps that the job names.

    A class may take more (each section of a long video is denoised anew) or fewer (a source that is partly kept).
    """

    def __init__(
        self, pipe: Any, job: Job, pipeline: Pipeline, meter: Meter, after_step: Callable[[int], None]
    ) -> None:
        self._pipe, self._job, self._meter, self._after_step = pipe, job, meter, after_step
        self._progress = pipeline.progress
        sections = -(-job.frames // pipeline.section_frames) if pipeline.section_frames else 1
        self._sections = sections * pipeline.stages
        self._count = 0

    def counting(self) -> AbstractContextManager[dict[str, Any]]:
        """A block in which steps are counted; it yields the keyword arguments that the call needs for it."""
        return _WAYS[self._progress](self)

    def step(self) -> None:
        """One more step is done. Raises Cancelled: `pipe._interrupt` would still run the VAE."""
        self._count += 1
        steps = self._job.steps
        done = min(steps, self._count * steps // self._expected())
        self._meter.step_done(done)
        self._after_step(done)

    def _expected(self) -> int:
        """The steps of the whole call, as the pipeline knows them once it has begun."""
        known = getattr(self._pipe, "num_timesteps", None) or self._job.steps
        return int(known) * self._sections

    @contextmanager
    def by_callback(self) -> Iterator[dict[str, Any]]:
        """The usual callback."""

        def report(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.step()
            return tensors

        yield {"callback_on_step_end": report}

    @contextmanager
    def by_old_callback(self) -> Iterator[dict[str, Any]]:
        """The callback of older classes."""
        yield {"callback": lambda *_: self.step(), "callback_steps": 1}

    @contextmanager
    def by_scheduler(self) -> Iterator[dict[str, Any]]:
        """For classes without a callback: each step of the scheduler is one."""
        scheduler = self._pipe.scheduler
        plain = scheduler.step

        def counted(*arguments: Any, **options: Any) -> Any:
            result = plain(*arguments, **options)
            self.step()
            return result

        scheduler.step = counted
        try:
            yield {}
        finally:
            del scheduler.step  # the instance's; the class's comes to light again


_WAYS: Mapping[str, Callable[[StepCounter], AbstractContextManager[dict[str, Any]]]] = {
    "callback_on_step_end": StepCounter.by_callback,
    "callback": StepCounter.by_old_callback,
    "none": StepCounter.by_scheduler,
}
