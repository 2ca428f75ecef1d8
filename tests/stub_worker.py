"""A worker without torch: it goes through every phase on the real board, and its files are whole videos.

A second of it costs nothing, so that a test can kill the daemon a hundred times.
"""

import os
import time
from datetime import UTC, datetime
from pathlib import Path

from engine.catalog.models import Model
from engine.gpu import worker
from engine.gpu.run.meter import Meter
from engine.job import Job, OutputFile, Phase, Result

CLIP = "STUB_CLIP"  # environment: a video to copy
STEP_S = 0.005
PIECES = 4  # in which a file is written


REAL_GENERATE = worker.generate


def make_clips(task_id: int, job: Job, model: Model) -> Result:
    """The worker's own `generate`, faults and all, with a session that copies the clip once a file."""
    worker._session = ClipStudio()  # type: ignore[assignment]
    return REAL_GENERATE(task_id, job, model)


class ClipStudio:
    """A session without a model. Cancelled, it leaves its unfinished part lying."""

    model_id = ""

    def make(self, task_id: int, job: Job, _model: Model, meter: Meter) -> Result:
        """As many files as the job asks for. Raises Cancelled."""
        prefix = f"{datetime.now(UTC):%Y%m%d-%H%M%S}_t{task_id:06d}-{worker._config.instance}_stub"
        files = []
        for run in range(runs(job)):
            files.append(make_clip(meter, run, job, prefix))
            worker._made(task_id, files[-1])
        return Result(tuple(files), meter.done(), 0, step_s=meter.step_s)

    def give_back(self) -> None:
        """Nothing to give."""


def runs(job: Job) -> int:
    """Passes through the pipeline."""
    return job.batch_size * job.repeat_generation


def make_clip(meter: Meter, run: int, job: Job, prefix: str) -> OutputFile:
    """One pass and its file. Raises Cancelled."""
    meter.enter(Phase.ENCODING)
    meter.begin_run(run, runs(job), job.steps)
    meter.enter(Phase.DENOISING)
    for step in range(job.steps):
        time.sleep(STEP_S)
        meter.step_done(step + 1)
    meter.enter(Phase.DECODING)
    meter.enter(Phase.SAVING)
    path = worker._config.save_path / f"{prefix}_s{job.seed + run}.mp4"
    publish(meter, path)
    return OutputFile(path.name, "video", path.stat().st_size, 32, 32, 5, 8, job.seed + run)


def publish(meter: Meter, path: Path) -> None:
    """Copy the clip to `path`, visible only when whole. Raises Cancelled."""
    data = Path(os.environ[CLIP]).read_bytes()
    part = path.with_name(f".{path.name}.part")
    size = -(-len(data) // PIECES)
    with part.open("wb") as file:
        for start in range(0, len(data), size):
            file.write(data[start : start + size])
            file.flush()
            time.sleep(STEP_S)
            meter.check()
    part.rename(path)
