"""Counting denoising steps, however a pipeline class reports them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from engine.catalog.models import Pipeline
from engine.gpu.run.meter import Meter
from engine.job import Job


@contextmanager
def counted_steps(
    pipe: Any, job: Job, pipeline: Pipeline, meter: Meter, after_step: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """Within the block the steps of one call are reported to `meter` and then to `after_step`.

    Yields the keyword arguments that the call needs for it. Steps are counted as shares of those that the job names: a
    class may take more (each section of a long video is denoised again) or fewer (a source that is partly kept).
    """
    numbers = count(1)

    def step_done(*_: Any) -> None:
        """Raises Cancelled: `pipe._interrupt` would still run the VAE."""
        done = min(job.steps, next(numbers) * job.steps // _expected(pipe, job, pipeline))
        meter.step_done(done)
        after_step(done)

    def on_step_end(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step_done()
        return tensors

    if pipeline.progress == "callback_on_step_end":
        yield {"callback_on_step_end": on_step_end}
    elif pipeline.progress == "callback":  # older classes
        yield {"callback": step_done, "callback_steps": 1}
    else:  # a class without a callback: each step of the scheduler is one
        with _after_each_step(pipe.scheduler, step_done):
            yield {}


@contextmanager
def _after_each_step(scheduler: Any, step_done: Callable[[], None]) -> Iterator[None]:
    plain = scheduler.step

    def step(*arguments: Any, **options: Any) -> Any:
        result = plain(*arguments, **options)
        step_done()
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step  # the instance's, which hides the class's


def _expected(pipe: Any, job: Job, pipeline: Pipeline) -> int:
    """The steps of the whole call, as the pipeline knows them once it has begun."""
    sections = -(-job.frames // pipeline.section_frames) if pipeline.section_frames else 1
    known = getattr(pipe, "num_timesteps", None) or job.steps
    return int(known) * sections * pipeline.stages
