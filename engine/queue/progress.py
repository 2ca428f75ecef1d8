"""How far a running task is: from the numbers on its engine's board to percent and steps."""

from collections.abc import Mapping
from dataclasses import replace

from engine.job import Phase
from engine.queue.tasks import Task
from engine.workers.lanes import Progress

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
    phase = progress.phase.label if progress.phase else task.phase
    if (reached, steps, phase) == (task.progress, task.steps_done, task.phase):
        return task
    return replace(task, progress=reached, steps_done=steps, phase=phase)
