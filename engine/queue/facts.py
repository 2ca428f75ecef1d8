"""What is learnt while tasks run, and kept in the journal over restarts: speeds, machines, the model last in use."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.job import Job, Phase, Result
from engine.planning.machine import Machine
from engine.queue.journal import Journal
from engine.queue.tasks import restored
from engine.workers.lanes import Runner

log = logging.getLogger("wangpd.queue")
T = TypeVar("T")
SLOW_STEPS = 20  # usual denoising steps without progress that make a hang
WEIGHT = 0.5  # of the newest measurement in the running mean
COVER_S = 60.0  # length of a sound that is made from another, as long as that one: its job does not know it


@dataclass(frozen=True)
class Pace:
    """Seconds for one model: to load it, and for a unit of `extent` of a denoising step and of all the rest."""

    load_s: float
    step_s: float
    rest_s: float


class Facts:
    """Paces are running means. Sizes are assumed to cost in proportion; attention makes large ones dearer than that."""

    def __init__(self) -> None:
        self._paces: dict[str, Pace] = {}  # by model id
        self.machines: dict[str, Machine] = {}  # device → what was measured there
        self.last_model = ""  # id of the one that was last in use, empty if there was none

    async def restore(self, journal: Journal) -> None:
        """Take in what a former life of the daemon has learnt. Raises JournalFault."""
        self._paces = _known(Pace, await journal.fact("speeds"))
        self.machines = _known(Machine, await journal.fact("machines"))
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
            self._paces[job.model] = _mean(self._paces.get(job.model), job, result, loaded)
        except Exception:  # an estimate is no promise: it must not cost a task its end
            log.warning("the times of a job of model %s could not be kept", job.model, exc_info=True)
            return {}
        return {"speeds": {model: vars(pace) for model, pace in self._paces.items()}}

    def patience_s(self, job: Job, floor_s: float) -> float:
        """How long `job` may show no progress: at least `floor_s`, and more if the steps of its model are slow."""
        pace = self._paces.get(job.model)
        return max(floor_s, SLOW_STEPS * pace.step_s * extent(job) * job.batch_size) if pace else floor_s

    def estimate_s(self, job: Job, warm: bool) -> float | None:
        """Seconds that `job` will take from its start, or None if its model has never run. `warm`: it is loaded."""
        pace = self._paces.get(job.model)
        if pace is None:
            return None
        work = extent(job) * job.batch_size * job.repeat_generation * (pace.step_s * job.steps + pace.rest_s)
        return round(work + (0.0 if warm else pace.load_s), 1)


def extent(job: Job) -> float:
    """Pixels times frames of one file, or the seconds of a sound."""
    return job.width * job.height * job.frames or job.duration_s or COVER_S


def _known(cls: type[T], stored: Any) -> dict[str, T]:
    """The facts of a kind by their names, without those that another version has written in another form."""
    facts: dict[str, T] = {}
    for name, values in stored.items() if isinstance(stored, dict) else ():
        with suppress(TypeError):
            facts[name] = restored(cls, values)
    return facts


def _mean(old: Pace | None, job: Job, result: Result, loaded: bool) -> Pace:
    spent, made = result.timings, extent(job) * job.batch_size * job.repeat_generation
    new = Pace(
        load_s=spent.get(Phase.LOADING.label, 0.0) if loaded or not old else old.load_s,
        step_s=spent.get(Phase.DENOISING.label, 0.0) / (made * job.steps),
        rest_s=sum(spent.get(phase.label, 0.0) for phase in (Phase.ENCODING, Phase.DECODING, Phase.SAVING)) / made,
    )
    if old is None:
        return new
    return Pace(**{name: (1 - WEIGHT) * value + WEIGHT * getattr(new, name) for name, value in vars(old).items()})
