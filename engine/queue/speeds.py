"""Estimates how long a job will take, from the times of earlier jobs of its model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.job import Job, Phase, Result

WEIGHT = 0.5  # of the newest measurement in the running mean
COVER_S = 60.0  # length of a sound that is made from another, as long as that one: its job does not know it


@dataclass(frozen=True)
class Pace:
    """Seconds for one model: to load it, and for a unit of `extent` of a denoising step and of all the rest."""

    load_s: float
    step_s: float
    rest_s: float


class Speeds:
    """Running means by model. Sizes are assumed to cost in proportion; attention makes large ones dearer than that."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._paces = {model: Pace(**pace) for model, pace in facts.items()}

    def facts(self) -> dict[str, dict[str, float]]:
        """The means as JSON values, for the journal."""
        return {model: vars(pace).copy() for model, pace in self._paces.items()}

    def learn(self, job: Job, result: Result, loaded: bool) -> None:
        """Take in a finished job; `loaded`: its model had to be loaded first."""
        spent = result.timings
        files = job.batch_size * job.repeat_generation
        rest = sum(spent.get(phase.name.lower(), 0) for phase in (Phase.ENCODING, Phase.DECODING, Phase.SAVING))
        old = self._paces.get(job.model)
        new = Pace(
            load_s=spent.get("loading", 0.0) if loaded or not old else old.load_s,
            step_s=spent.get("denoising", 0.0) / (extent(job) * job.steps * files),
            rest_s=rest / (extent(job) * files),
        )
        self._paces[job.model] = _mean(old, new) if old else new

    def step_s(self, job: Job) -> float:
        """Seconds that a denoising step of `job` will take; 0 if its model has never run."""
        pace = self._paces.get(job.model)
        return pace.step_s * extent(job) * job.batch_size if pace else 0.0

    def estimate_s(self, job: Job, warm: bool) -> float | None:
        """Seconds that `job` will take from its start, or None if its model has never run. `warm`: it is loaded."""
        pace = self._paces.get(job.model)
        if pace is None:
            return None
        files = job.batch_size * job.repeat_generation
        work = extent(job) * files * (pace.step_s * job.steps + pace.rest_s)
        return round(work + (0.0 if warm else pace.load_s), 1)


def extent(job: Job) -> float:
    """Pixels times frames of one file, or the seconds of a sound."""
    return job.width * job.height * job.frames or job.duration_s or COVER_S


def _mean(old: Pace, new: Pace) -> Pace:
    return Pace(**{name: (1 - WEIGHT) * value + WEIGHT * getattr(new, name) for name, value in vars(old).items()})
