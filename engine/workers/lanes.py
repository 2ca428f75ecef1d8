"""The lanes: engines that work side by side, one a device, which of them is free, and what keeps one from working."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.catalog.models import Model
from engine.job import Job, OutputFile, Phase, Result
from engine.planning.machine import Machine

log = logging.getLogger("wangpd.queue")
CHECK_AGAIN_S, MOST_CHECK_S = 5.0, 60.0  # after a fault of an engine, and doubled after each check that fails


@dataclass(frozen=True)
class Progress:
    """How far the running job is: in `phase`, at `step` of `steps` denoising steps of pass `run` of `runs`."""

    phase: Phase
    run: int
    runs: int
    step: int
    steps: int


class Runner(Protocol):
    """What the queue needs of an engine: the seam for more devices and machines."""

    device: str  # as configured

    async def run(self, task_id: int, job: Job, model: Model, patience_s: float, free: Callable[[], object]) -> Result:
        """Run one job; `free` is called as soon as the next may be run. Raises EngineError or Cancelled."""

    async def load(self, model: Model) -> None:
        """Make a model warm. Raises EngineError."""

    async def check(self) -> None:
        """Raises EngineError if the device can't work."""

    def made(self, task_id: int) -> Sequence[OutputFile]:
        """The whole files of a run that was broken off."""

    def loaded(self, model_id: str) -> bool:
        """True if a model is warm."""

    def unload(self) -> bool:
        """Give all memory back. False if there was nothing to give, or if it works."""

    def cancel(self, task_id: int) -> None:
        """End the job that runs, if it is this task's."""

    def progress(self, task_id: int) -> Progress | None:
        """How far it is; None if another one runs."""

    @property
    def plan(self) -> str:
        """Where the weights of its model are, in a line; empty while nothing is warm."""

    @property
    def machine(self) -> Machine | None:
        """What it has measured of its device; None until then."""


@dataclass(eq=False)
class Lane:
    """An engine as the queue sees it. Times are of `time.monotonic`."""

    engine: Runner
    holder: object | None = None  # what it works on, a task or a model to be made warm; None: it is free
    idle_since: float = field(default_factory=time.monotonic)
    fault: str = ""  # why it can't work; it gets no task until a check has succeeded
    suspect: bool = False  # its device has failed in a task, and must be checked before the next one
    check_at: float = 0.0
    check_s: float = CHECK_AGAIN_S  # until the check after the next one

    def release(self, holder: object) -> None:
        """Be free for the next holder; nothing happens if this one has let it go already."""
        if self.holder is holder:
            self.holder, self.idle_since = None, time.monotonic()

    def fail(self, sentence: str) -> None:
        """Note that its engine can't work on this machine as it is."""
        if self.fault != sentence:
            log.error("%s takes no tasks until it works: %s", self.engine.device, sentence)
        self.fault, self.suspect, self.check_at = sentence, False, time.monotonic() + self.check_s
        self.check_s = min(2 * self.check_s, MOST_CHECK_S)

    def recover(self) -> None:
        """Note that its engine works."""
        if self.fault:
            log.info("%s works again", self.engine.device)
        self.fault, self.suspect, self.check_s = "", False, CHECK_AGAIN_S

    @property
    def up(self) -> bool:
        """It works, as far as is known."""
        return not self.fault and not self.suspect


class Lanes(tuple[Lane, ...]):
    """All lanes, in the order of the configuration. Used on the event loop only."""

    def __new__(cls, engines: Sequence[Runner]) -> "Lanes":
        return super().__new__(cls, map(Lane, engines))

    def up(self) -> list[Lane]:
        """The lanes that work, as far as is known."""
        return [lane for lane in self if lane.up]

    def take(self, holder: object, model_id: str) -> Lane | None:
        """Give `holder` the free lane where its model is warm, or else the longest idle one; None if none is free."""
        free = [lane for lane in self.up() if lane.holder is None]
        lane = min(free, key=lambda lane: (not lane.engine.loaded(model_id), lane.idle_since), default=None)
        if lane:
            lane.holder = holder
        return lane

    def take_to_check(self) -> Lane | None:
        """A free lane whose engine is due to be checked, held by itself; None if there is none."""
        now = time.monotonic()
        due = (lane for lane in self if lane.holder is None and not lane.up and (lane.suspect or lane.check_at <= now))
        if lane := next(due, None):
            lane.holder = lane
        return lane

    @property
    def fault(self) -> str:
        """Why no lane can work; empty as long as one can."""
        return self[0].fault if all(lane.fault for lane in self) else ""

    def remarks(self) -> list[str]:
        """What keeps some lanes from working, a sentence each, while others do."""
        return [] if self.fault else [f"{lane.engine.device}: {lane.fault}" for lane in self if lane.fault]

    def loaded(self, model_id: str) -> bool:
        """True if a model is warm in some lane: a task of it loads nothing there."""
        return any(lane.engine.loaded(model_id) for lane in self)

    def cancel(self, task_id: int) -> None:
        """End the work on this task, wherever it runs."""
        for lane in self:
            lane.engine.cancel(task_id)

    def unload(self) -> bool:
        """Give all memory back; False if there was nothing to give."""
        return sum(lane.engine.unload() for lane in self) > 0  # not `any`, which would stop at the first

    def unload_idle(self, idle_s: float) -> list[str]:
        """Give back the memory of lanes that have been idle for `idle_s` seconds; returns the devices that had some."""
        now = time.monotonic()
        idle = [lane for lane in self if lane.holder is None and now - lane.idle_since >= idle_s]
        for lane in idle:
            lane.idle_since = now
        return [lane.engine.device for lane in idle if lane.engine.unload()]

    def rest_s(self, idle_s: float) -> float | None:
        """Seconds until a free lane has been idle for `idle_s` (0: never) or is to be checked; None: never."""
        free = [lane for lane in self if lane.holder is None]
        due = [lane.check_at if lane.fault else lane.idle_since + idle_s for lane in free if lane.fault or idle_s]
        return max(0.0, min(due) - time.monotonic()) if due else None
