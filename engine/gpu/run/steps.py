"""Counting denoising steps, however a pipeline class reports them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.catalog.models import Pipeline
from engine.gpu.run.meter import Meter
from engine.job import Job


class StepCounter:
    """Reports the steps of one call to the meter, as shares of the steps that the job names.

    A class may take more (each section of a long video is denoised again) or fewer (a source that is partly kept).
    """

    def __init__(
        self, pipe: Any, job: Job, pipeline: Pipeline, meter: Meter, after_step: Callable[[int], None]
    ) -> None:
        self._pipe, self._job, self._pipeline, self._meter, self._after_step = pipe, job, pipeline, meter, after_step
        self._count = 0

    @contextmanager
    def counting(self) -> Iterator[dict[str, Any]]:
        """Within the block steps are counted; yields the keyword arguments that the call needs for it."""
        if self._pipeline.progress == "callback_on_step_end":
            yield {"callback_on_step_end": self._on_step_end}
        elif self._pipeline.progress == "callback":  # older classes
            yield {"callback": lambda *_: self._step(), "callback_steps": 1}
        else:  # a class without a callback: each step of the scheduler is one
            with self._counting_scheduler():
                yield {}

    def _on_step_end(self, _pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._step()
        return tensors

    @contextmanager
    def _counting_scheduler(self) -> Iterator[None]:
        scheduler = self._pipe.scheduler
        plain = scheduler.step

        def counted(*arguments: Any, **options: Any) -> Any:
            result = plain(*arguments, **options)
            self._step()
            return result

        scheduler.step = counted
        try:
            yield
        finally:
            del scheduler.step  # the instance's, which hides the class's

    def _step(self) -> None:
        """One more step is done. Raises Cancelled: `pipe._interrupt` would still run the VAE."""
        self._count += 1
        done = min(self._job.steps, self._count * self._job.steps // self._expected())
        self._meter.step_done(done)
        self._after_step(done)

    def _expected(self) -> int:
        """The steps of the whole call, as the pipeline knows them once it has begun."""
        section_frames = self._pipeline.section_frames
        sections = -(-self._job.frames // section_frames) if section_frames else 1
        known = getattr(self._pipe, "num_timesteps", None) or self._job.steps
        return int(known) * sections * self._pipeline.stages
