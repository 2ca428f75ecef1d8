"""A worker without a model, for a soak: its frames cost nothing, but the product's own code writes the files.

SOAK_RUNS names a file that gets a line for each task that is begun: its id, and the monotonic time in nanoseconds.
"""

import os
import time
from concurrent.futures import wait
from datetime import UTC, datetime
from typing import Any

from engine.catalog.models import Model
from engine.gpu import worker
from engine.gpu.run.meter import Meter
from engine.job import Job, Phase, Result

RUNS = "SOAK_RUNS"
STEP_S = 0.01

REAL_GENERATE = worker.generate


def generate(task_id: int, job: Job, model: Model) -> Result:
    """The worker's own `generate`, with a session that has no model."""
    worker._session = worker._session or FrameSession()  # type: ignore[assignment]
    note(task_id)
    return REAL_GENERATE(task_id, job, model)


def note(task_id: int) -> None:
    """Add a line to the file of those that were begun."""
    handle = os.open(os.environ[RUNS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, f"{task_id} {time.monotonic_ns()}\n".encode())
    finally:
        os.close(handle)


class FrameSession:
    """Makes plain frames, and gives them to the saver of the product."""

    model_id = ""

    def __init__(self) -> None:
        from engine.gpu.save.saving import Saver

        self._saver: Any = Saver(worker._config, worker._settled, worker._made)

    def make(self, task_id: int, job: Job, _model: Model, meter: Meter) -> Result:
        """As many clips as the job asks for, which are still being written. Raises EngineError or Cancelled."""
        import torch  # here: the daemon imports this module too

        from engine.gpu.run.results import Clip

        started, saved = datetime.now(UTC), []
        frames = torch.zeros((job.frames, job.height, job.width, 3), dtype=torch.uint8)
        try:
            for run in range(job.batch_size * job.repeat_generation):
                denoise(meter, run, job)
                for file in saved:
                    file.require_well()
                saved.append(self._saver.save(task_id, Clip(job.seed + run, [frames]), job, started))
        except BaseException:
            wait([file.written for file in saved])
            raise
        pending = self._saver.finish(saved)
        return Result(tuple(file.file for file in saved), meter.done(), 0, "", pending)

    def give_back(self) -> None:
        """Nothing to give."""


def denoise(meter: Meter, run: int, job: Job) -> None:
    """Go through the phases of a run. Raises Cancelled."""
    meter.enter(Phase.ENCODING)
    meter.begin_run(run, job.batch_size * job.repeat_generation, job.steps)
    meter.enter(Phase.DENOISING)
    for step in range(job.steps):
        time.sleep(STEP_S)
        meter.step_done(step + 1)
    meter.enter(Phase.DECODING)
