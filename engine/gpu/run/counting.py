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
