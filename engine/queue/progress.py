"""How far the tasks are, how long they will take, what keeps the queue from working: all that is only read."""

import heapq
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from engine.catalog.models import Catalog
from engine.job import Job, Phase
from engine.planning.machine import Machine
from engine.planning.work import Work
from engine.queue.events import EventKind, EventsLost
from engine.queue.facts import Facts
from engine.queue.store import TaskStore
from engine.queue.tasks import Status, Task
from engine.workers.lanes import Lanes, Progress

ADDED_UP_S = 1.0  # how old the sum of all that waits may be
KNOWN_PERCENT = 5  # from here on, a task's own pace says more than those of earlier ones
# How far a pass through the pipeline is when a phase begins, and how much of it that phase is.
SHARES: Mapping[Phase, tuple[float, float]] = {
    Phase.IDLE: (0.0, 0.0),
    Phase.LOADING: (0.0, 0.0),
    Phase.ENCODING: (0.0, 0.02),
    Phase.DENOISING: (0.02, 0.9),
    Phase.DECODING: (0.92, 0.05),
    Phase.SAVING: (0.97, 0.03),
}


def percent(progress: Progress) -> float:
    """0 to 99.9: only a completed task is at 100."""
    if not progress.runs:
        return 0.0
    start, share = SHARES[progress.phase]
    part = progress.step / progress.steps if progress.phase is Phase.DENOISING and progress.steps else 0.0
    return round(min(99.9, 100 * (progress.run + start + share * part) / progress.runs), 1)


def advanced(task: Task, progress: Progress | None) -> Task:
    """The version of a running task that is as far as its engine shows, `task` itself if that is nothing new.

    Percent and steps only grow, though a second attempt begins at 0 again.
    """
    if progress is None:
        return task
    reached = max(task.progress, percent(progress))
    steps = max(task.steps_done, progress.run * progress.steps + progress.step)
    phase = progress.phase.name.lower() if progress.phase else task.phase
    if (reached, steps, phase) == (task.progress, task.steps_done, task.phase):
        return task
    return replace(task, progress=reached, steps_done=steps, phase=phase)


class QueueView:
    """What can be asked of the queue without changing it. A getter only reads."""

    def __init__(self, store: TaskStore, lanes: Lanes, catalog: Catalog, facts: Facts) -> None:
        self._store, self._lanes, self._catalog, self._facts = store, lanes, catalog, facts
        self.events = store.events
        self._free_at: list[float] = []  # seconds until each lane is free, a heap
        self._added_up_at, self._seen_id = -math.inf, 0

    # -- tasks

    def active(self, task_id: int) -> Task | None:
        """The task with this id if it has not ended."""
        return self._store.active(task_id)

    def listing(self) -> list[Task]:
        """The tasks that have not ended: those that run, then those that wait, in their order."""
        return [*self._store.running.values(), *self._store.waiting]

    @property
    def at_work(self) -> list[Task]:
        """The tasks that run, in the order in which they started."""
        return list(self._store.running.values())

    @property
    def current(self) -> Task | None:
        """The task that runs; of several, the one that started first."""
        return next(iter(self._store.running.values()), None)

    @property
    def paused(self) -> bool:
        """No waiting task starts."""
        return self._store.paused

    def position(self, task: Task) -> int | None:
        """1 for a task that runs or is next, the others count on from those that run; None once it has ended."""
        if task.id in self._store.running:
            return 1
        place = self._store.waiting.place(task.id)
        return None if place is None else place + 1 + len(self._store.running)

    def progress_percent(self, task: Task) -> float:
        """0 to 100; it only grows, and is 100 once the task is completed."""
        return 100.0 if task.status is Status.COMPLETED else task.progress

    def steps_done(self, task: Task) -> tuple[int, int]:
        """Denoising steps done and to do, over all runs of the task; the first only grows."""
        total = task.job.steps * self._runs(task.job)
        return total if task.status is Status.COMPLETED else task.steps_done, total

    def _runs(self, job: Job) -> int:
        """Passes through the pipeline; the files of a batch are made in one, where the class can."""
        model = self._catalog.get(job.model) if job.model in self._catalog else None
        if model and job.task in model.pipelines:
            return Work.of(model, job).runs
        return job.repeat_generation * job.batch_size

    def phase(self, task: Task) -> str | None:
        """`loading`, `encoding` … while the task runs."""
        return task.phase or None

    # -- seconds

    def estimate_s(self, job: Job) -> float | None:
        """Seconds of its own work that `job` will take; None if its model has never run."""
        return self._facts.speeds.estimate_s(job, self._lanes.loaded(job.model))

    def eta_s(self, task: Task) -> float | None:
        """Seconds of work still ahead of this task, none of them spent in the queue; None if nothing is known."""
        if task.status.ended:
            return None
        if task.started_at and task.progress >= KNOWN_PERCENT:
            return round((time.time() - task.started_at) * (100 - task.progress) / task.progress, 1)
        estimate_s = self.estimate_s(task.job)
        return None if estimate_s is None else round(estimate_s * (1 - task.progress / 100), 1)

    def estimated_wait_s(self) -> float | None:
        """Seconds until a task that is submitted now would start; None if a task without history decides it."""
        for task in self._not_added_up():
            eta_s = self.eta_s(task)
            heapq.heapreplace(self._free_at, self._free_at[0] + (math.inf if eta_s is None else eta_s))
        return None if math.isinf(self._free_at[0]) else round(self._free_at[0], 1)

    def _not_added_up(self) -> list[Task]:
        """The tasks that `_free_at` lacks: new ones, so that a submission costs the same however many wait.

        It is all of them if anything else has happened, or a second has passed.
        """
        now, seen_id, self._seen_id = time.monotonic(), self._seen_id, self.events.last_id
        with suppress(EventsLost):
            new = self.events.since(seen_id)
            if now - self._added_up_at < ADDED_UP_S and all(event.kind is EventKind.QUEUED for event in new):
                return [event.task for event in new if event.task]
        self._free_at, self._added_up_at = [0.0] * (len(self._lanes.up()) or len(self._lanes)), now
        return self.listing()

    # -- the engines

    @property
    def faults(self) -> dict[str, str]:
        """What keeps the queue from working now, a sentence each."""
        found = {"journal": self._store.fault, "engine": self._lanes.fault}
        return {name: sentence for name, sentence in found.items() if sentence}

    def remarks(self) -> list[str]:
        """What keeps some of the engines from working, a sentence each, while others do."""
        return self._lanes.remarks()

    def loaded(self, model_id: str) -> bool:
        """True if a model is warm: a task of it loads nothing where it is."""
        return self._lanes.loaded(model_id)

    @property
    def last_model(self) -> str:
        """Id of the model that was last in use, also before a restart; empty if there was none."""
        return self._facts.last_model

    @property
    def plans(self) -> list[str]:
        """Where the weights of each warm model are, in a line."""
        return [lane.engine.plan for lane in self._lanes if lane.engine.plan]

    @property
    def machines(self) -> list[Machine]:
        """What was ever measured of the devices in use."""
        known = self._facts.machines
        return [known[lane.engine.device] for lane in self._lanes if lane.engine.device in known]
