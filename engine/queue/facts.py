"""What is learnt while tasks run, and kept in the journal over restarts: speeds, machines, the model last in use."""

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from engine.catalog.models import Catalog
from engine.job import Job, Phase, Result
from engine.planning.machine import Machine
from engine.planning.work import Work
from engine.queue.journal import Journal
from engine.queue.tasks import restored
from engine.workers.lanes import Runner

log = logging.getLogger("wangpd.queue")
TIMED = (Phase.LOADING, Phase.ENCODING, Phase.DENOISING, Phase.DECODING, Phase.SAVING)
SLOW_STEPS = 20  # usual denoising steps without progress that make a hang
SAME = 1.1  # sizes that differ less are one
MOST_SIZES = 8  # of a model, that are remembered
MOST_ESTIMATES = 10_000
STEPS_COUNT = 4.0  # times all other parts: the steps alone say how long a job takes
# A step costs between a fixed time and the square of its size (attention), so in proportion it is within a factor of 2
# up to twice the size. Between two known sizes a power of the size is, if they are no further apart than this.
NEAR, BETWEEN = 2.0, 8.0
# What of a job its time depends on.
WHAT_DECIDES = attrgetter(
    *("model", "task", "width", "height", "frames", "window_frames", "window_overlap", "steps"),
    *("guidance_scale", "duration_s", "batch_size", "repeat_generation"),
)


@dataclass(frozen=True)
class Pace:
    """The seconds of a job of one model, by their parts."""

    extent: float  # voxels of a run (a call of the pipeline), or tokens of a sound
    load_s: float
    encode_s: float  # of all runs: the same prompt is encoded once
    step_s: float  # a forward of the denoiser (0: not known); as `Facts.pace` returns it, all of a step
    rest_s: float  # decoding and saving, of a run
    cold: bool  # the model had just been loaded: what is done for the first time is slower

    def total_s(self, steps: int, runs: int, warm: bool) -> float:
        """The whole job, its steps counted over all runs. `warm`: its model is loaded."""
        return self.encode_s + steps * self.step_s + runs * self.rest_s + (0.0 if warm else self.load_s)


class Facts:
    """What is known of models and machines."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._paces: dict[str, list[Pace]] = {}  # by model id, of several sizes, the newest last
        self._estimates: dict[tuple[Any, ...], float | None] = {}
        self.machines: dict[str, Machine] = {}  # device → what was measured there
        self.last_model = ""  # id of the one that was last in use, empty if there was none

    async def restore(self, journal: Journal) -> None:
        """Take in what a former life of the daemon has learnt. Raises JournalFault."""
        paces, machines = [await journal.fact(name, {}) for name in ("paces", "machines")]
        with suppress(AttributeError, TypeError):  # another version has written it in another form
            self._paces = {model: [restored(Pace, each) for each in known] for model, known in paces.items()}
        with suppress(AttributeError, TypeError):
            self.machines = {device: restored(Machine, each) for device, each in machines.items()}
        self.last_model = str(await journal.fact("model", ""))

    def used(self, engine: Runner, model_id: str) -> dict[str, Any]:
        """Note that `engine` has worked with this model; returns what has changed, for `Journal.save`."""
        changed: dict[str, Any] = {}
        if model_id != self.last_model:
            changed["model"] = self.last_model = model_id
        if engine.machine and engine.machine != self.machines.get(engine.device):
            self.machines[engine.device] = engine.machine
            changed["machines"] = {device: vars(machine) for device, machine in self.machines.items()}
        return changed

    def learn(self, job: Job, result: Result, loaded: bool) -> dict[str, Any]:
        """Take in the times of a finished job; returns what has changed. `loaded`: its model had to be loaded first."""
        try:
            self._take_in(job, result, loaded)
        except Exception:  # an estimate is no promise: it must not cost a task its end
            log.warning("the times of a job of model %s could not be kept", job.model, exc_info=True)
            return {}
        return {"paces": {model: list(map(vars, paces)) for model, paces in self._paces.items()}}

    def _take_in(self, job: Job, result: Result, loaded: bool) -> None:
        work, known = self.work(job), self._paces.get(job.model, [])
        if work is None:
            return
        load_s, encode_s, denoise_s, decode_s, save_s = (result.timings.get(phase.label, 0.0) for phase in TIMED)
        # One step, and a process that had just loaded: it was mostly what is done for the first time.
        step_s = result.step_s or (0.0 if loaded else denoise_s / (job.steps * work.runs))
        load_s = load_s if loaded or not known else known[-1].load_s
        rest_s = (decode_s + save_s) / work.runs
        new = Pace(_extent(work), load_s, encode_s, step_s / work.passes, rest_s, cold=loaded)
        same = next((pace for pace in known if _ratio(pace.extent, new.extent) <= SAME), None)
        if same and new.cold and not same.cold:  # says more
            new = replace(same, load_s=load_s)
        self._paces[job.model] = [*(pace for pace in known if pace is not same), new][-MOST_SIZES:]
        self._estimates.clear()

    def work(self, job: Job) -> Work | None:
        """What `job` asks for; None if its model is gone."""
        model = self.catalog.get(job.model) if job.model in self.catalog else None
        return Work.of(model, job) if model and job.task in model.pipelines else None

    def patience_s(self, job: Job, floor_s: float) -> float:
        """How long `job` may show no progress: at least `floor_s`, and more if the steps of its model are slow."""
        work, known = self.work(job), self._paces.get(job.model)
        if not work or not known:
            return floor_s
        near = _nearest(known, _extent(work))
        return max(floor_s, SLOW_STEPS * near.step_s * work.passes * _extent(work) / near.extent)

    def pace(self, job: Job) -> Pace | None:
        """What `job` will take, its parts; None if no job of its model and of about its size has run."""
        work, known = self.work(job), [pace for pace in self._paces.get(job.model, ()) if pace.step_s]
        if not work or not known:
            return None
        near = _nearest(known, _extent(work))
        pace = _at(_extent(work), near, [pace for pace in known if pace.cold is near.cold])
        if pace is None:
            return None
        step_s = work.passes * pace.step_s
        if near.cold and job.steps * work.runs * step_s < STEPS_COUNT * (near.encode_s + work.runs * pace.rest_s):
            return None  # too much of it may be what is slow the first time only
        return replace(pace, step_s=step_s)

    def estimate_s(self, job: Job, warm: bool) -> float | None:
        """Seconds that `job` will take from its start, or None if that is not known. `warm`: its model is loaded."""
        key = warm, *WHAT_DECIDES(job)
        if key not in self._estimates:  # ten thousand that wait are mostly of few sizes
            if len(self._estimates) >= MOST_ESTIMATES:  # a client may ask for any number of sizes
                self._estimates.clear()
            pace, work = self.pace(job), self.work(job)
            total_s = pace.total_s(job.steps * work.runs, work.runs, warm) if pace and work else None
            self._estimates[key] = None if total_s is None else round(total_s, 1)
        return self._estimates[key]


def _extent(work: Work) -> float:
    return work.voxels or work.tokens * work.batch


def _ratio(one: float, other: float) -> float:
    return max(one, other) / min(one, other)


def _nearest(known: Sequence[Pace], extent: float) -> Pace:
    return min(known, key=lambda pace: _ratio(pace.extent, extent))


def _at(extent: float, near: Pace, known: Sequence[Pace]) -> Pace | None:
    """The pace at this extent, from those around it or the one that is `near`; None if it is too far from all."""
    below = max((pace for pace in known if pace.extent <= extent), key=lambda pace: pace.extent, default=near)
    above = min((pace for pace in known if pace.extent >= extent), key=lambda pace: pace.extent, default=near)
    if below.extent < above.extent <= BETWEEN * below.extent:
        share = math.log(extent / below.extent) / math.log(above.extent / below.extent)
        step_s = below.step_s ** (1 - share) * above.step_s**share
        return replace(near, step_s=step_s, rest_s=below.rest_s ** (1 - share) * above.rest_s**share)
    times = extent / near.extent
    in_proportion = replace(near, step_s=near.step_s * times, rest_s=near.rest_s * times)
    return in_proportion if _ratio(near.extent, extent) <= NEAR else None
