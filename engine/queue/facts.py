"""What is learnt while tasks run, and kept in the journal over restarts: speeds, machines, the model last in use."""

import logging
from typing import Any

from engine.job import Job, Result
from engine.planning.machine import Machine
from engine.queue.journal import Journal
from engine.queue.speeds import Speeds
from engine.workers.lanes import Runner

log = logging.getLogger("wangpd.queue")
SLOW_STEPS = 20  # usual denoising steps without progress that make a hang


class Facts:
    """Each method that takes something in returns what has changed, as JSON values for `Journal.save`."""

    def __init__(self) -> None:
        self.speeds = Speeds({})
        self.machines: dict[str, Machine] = {}  # device → what was measured there
        self.last_model = ""  # id of the one that was last in use

    async def restore(self, journal: Journal) -> None:
        """Take in what a former life of the daemon has learnt. Raises JournalFault."""
        self.speeds = Speeds(await journal.fact("speeds", {}))
        self.last_model = await journal.fact("model", "")
        machines = await journal.fact("machines", {})
        self.machines = {device: Machine(**machine) for device, machine in machines.items()}

    def used(self, engine: Runner, model_id: str) -> dict[str, Any]:
        """`engine` has worked with this model."""
        changed: dict[str, Any] = {}
        if model_id != self.last_model:
            changed["model"] = self.last_model = model_id
        if engine.machine and engine.machine != self.machines.get(engine.device):
            self.machines[engine.device] = engine.machine
            changed["machines"] = {device: vars(machine) for device, machine in self.machines.items()}
        return changed

    def finished(self, job: Job, result: Result, loaded: bool) -> dict[str, Any]:
        """`job` has ended well; `loaded`: its model had to be loaded first."""
        try:
            self.speeds.learn(job, result, loaded=loaded)
            return {"speeds": self.speeds.facts()}
        except Exception:  # an estimate is no promise: it must not cost a task its end
            log.warning("the times of a job of model %s could not be kept", job.model, exc_info=True)
            return {}

    def patience_s(self, job: Job, floor_s: float) -> float:
        """How long `job` may show no progress: at least `floor_s`, and more if the steps of its model are slow."""
        return max(floor_s, SLOW_STEPS * self.speeds.step_s(job))
