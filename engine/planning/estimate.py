"""The estimate: what a job will take of a machine that was measured, told before it runs and without a GPU."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from engine.catalog.models import Model
from engine.job import EngineError, Job
from engine.planning.machine import Machine
from engine.planning.placement import Plan, plan
from engine.planning.work import Work


@dataclass(frozen=True)
class Estimate:
    """`memory_bytes` are the most at once, of the card, or of RAM without one; `seconds` those of the job once its
    model is loaded; `plan` says in a line where the weights will lie."""

    memory_bytes: int
    seconds: float
    plan: str

    @classmethod
    def of(cls, plan: Plan) -> "Estimate":
        """What the plan says."""
        return cls(plan.peak_vram_bytes if plan.card_bytes else plan.ram_bytes, plan.job_s, plan.describe())


def estimate(
    model: Model, job: Job, machines: Iterable[Machine], *, profile: float, quantization: str, vae_config: int
) -> Estimate | None:
    """What `job` will take on the machine where it is fastest; None if none was measured yet.

    The last three are as in `engine.memory.plan`. Raises EngineError, which says what is missing, if it fits on none.
    """
    work, known = Work.of(model, job), list(machines)

    def planned(machine: Machine) -> Plan:
        return plan(model, work, machine, profile=profile, quantization=quantization, vae_config=vae_config)

    plans: list[Plan] = []
    for machine in known:
        with suppress(EngineError):
            plans.append(planned(machine))
    if known and not plans:
        planned(known[0])  # raises
    return Estimate.of(min(plans, key=lambda found: found.job_s)) if plans else None
