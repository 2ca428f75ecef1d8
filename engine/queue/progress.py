"""How far a running task is: from the numbers on its engine's board to percent, steps and the time that is left."""

import time
from collections.abc import Mapping
from dataclasses import replace

from engine.job import Phase
from engine.queue.facts import Pace
from engine.queue.tasks import Task
from engine.workers.lanes import Progress

# How far a pass through the pipeline is when a phase begins, and how much of it that phase is.
SHARES: Mapping[Phase, tuple[float, float]] = {
    Phase.ENCODING: (0.0, 0.02),
    Phase.DENOISING: (0.02, 0.9),
    Phase.DECODING: (0.92, 0.05),
    Phase.SAVING: (0.97, 0.03),
}


def percent(progress: Progress) -> float:
    """0 to 99.9: only a completed task is at 100."""
    if not progress.runs:
        return 0.0
    start, share = SHARES.get(progress.phase, (0.0, 0.0))
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
    phase = progress.phase.label if progress.phase else task.phase
    if (reached, steps, phase) == (task.progress, task.steps_done, task.phase):
        return task
    return replace(task, progress=reached, steps_done=steps, phase=phase)


SEEN_STEPS = 3  # from here on, a task's own steps say more than those of earlier tasks
OWN_SLEEP_S = 1.0  # between two looks: the daemon did not run, or waited for its disk
UNKNOWN_REST = 1.1  # what follows the steps of a model that has not run yet, as a share of all
LEAST_UNKNOWN_S = 5.0  # below that, what follows them may well be more


class TaskClock:
    """The time that a running task takes, as its engine shows it. `warm`: its model was loaded when it started."""

    def __init__(self, warm: bool) -> None:
        self._shown: Progress | None = None
        self._warm, self._began = warm, time.monotonic()
        self._part: tuple[Phase, int] | None = None  # what is under way, and of which run
        self._part_began = self._looked = self._began
        self._first, self._first_at = 0, 0.0  # the first step that was seen in this run, and when
        self._step_s: float | None = None

    def look(self, shown: Progress | None) -> None:
        """Take in what the engine shows now; None: its process is being started."""
        before, now = self._shown, time.monotonic()
        late, self._looked, self._shown = now - self._looked > OWN_SLEEP_S, now, shown
        part = (min(shown.phase, Phase.DECODING), shown.run) if shown else None  # what is learnt of saving is in it
        if shown is None or before is None or part != self._part:
            self._part, self._part_began, self._first = part, now, 0
        elif late or not self._first:
            self._first, self._first_at = shown.step, now
        elif shown.step != before.step and shown.step - self._first >= SEEN_STEPS:
            self._step_s = (now - self._first_at) / (shown.step - self._first)

    def left_s(self, pace: Pace | None, work_s: float | None) -> float | None:
        """Seconds of work still ahead, None if that can't be known.

        `pace` and `work_s` are what such a job takes, and all of it once its model is loaded, if that is known.
        """
        shown, now = self._shown, time.monotonic()
        if shown is None or not (shown.run or shown.step):  # it loads, encodes, or takes its first step
            if pace is None or work_s is None:
                return None
            loads = not self._warm and (shown is None or shown.phase <= Phase.LOADING)
            return work_s + (max(0.0, pace.load_s - (now - self._began)) if loads else 0.0)
        runs = shown.runs - shown.run
        steps, step_s = runs * shown.steps - shown.step, self._step_s or (pace and pace.step_s)
        if pace and step_s:
            done_s = min(now - self._part_began, pace.rest_s) if shown.phase > Phase.DENOISING else 0.0
            return steps * step_s + runs * pace.rest_s - done_s
        left_s = UNKNOWN_REST * steps * (self._step_s or 0.0)
        first_half = shown.phase is Phase.DENOISING and 2 * steps >= shown.runs * shown.steps
        return left_s if first_half and left_s >= LEAST_UNKNOWN_S else None
