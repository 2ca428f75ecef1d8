"""Estimates what a job will need of a measured machine, before it runs and without a GPU."""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.catalog.models import Model
from engine.job import EngineError, Job
from engine.planning.machine import Machine
from engine.planning.placement import Plan, plan
from engine.planning.work import Work


@dataclass(frozen=True)
class Estimate:
    """What a job will need."""

    memory_bytes: int  # the most at once, of the card, or of RAM without one
    seconds: float  # once the model is loaded
    plan: str  # one line: where the weights will be


def estimate(
    model: Model, job: Job, machines: Iterable[Machine], *, profile: float, quantization: str, vae_config: int
) -> Estimate | None:
    """What `job` will need on the machine where it is fastest; None if none has been measured yet.

    The last three are as in `placement.plan`. Raises its EngineError, which says what is missing, if it fits on none.
    """
    work = Work.of(model, job)
    plans: list[Plan] = []
    refusals: list[EngineError] = []
    for machine in machines:
        try:
            plans.append(plan(model, work, machine, profile=profile, quantization=quantization, vae_config=vae_config))
        except EngineError as refusal:
            refusals.append(refusal)
    if not plans:
        if refusals:
            raise refusals[0]
        return None
    fastest = min(plans, key=lambda found: found.job_s)
    memory_bytes = fastest.peak_vram_bytes if fastest.card_bytes else fastest.ram_bytes
    return Estimate(memory_bytes, fastest.job_s, fastest.describe())
