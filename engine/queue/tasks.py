"""A task: one accepted request, its states and its results, in memory and as a record of the journal."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine.job import Job, Lora, OutputFile


class Status(StrEnum):
    """`queued → processing → completed | failed | cancelled`, by way of `cancelling`.

    Back to `queued` only where the daemon ends, or the engine can't work.
    """

    QUEUED = "queued"
    PROCESSING = "processing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """True once nothing more will happen."""
        return self in ENDED


ENDED = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


class NoSuchTask(Exception):
    """No task has this id, or its record is no longer kept."""


class WrongState(Exception):
    """The task is not in a state that allows this."""


@dataclass(slots=True, eq=False)
class Task:
    """One version of a task, see TaskStore. Times are seconds since the epoch."""

    id: int
    job: Job
    status: Status = Status.QUEUED
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    finished_at: float | None = None
    attempts: int = 0  # starts, less those that were put back
    warnings: tuple[str, ...] = ()
    error: Mapping[str, str] | None = None  # {"code", "message"}
    files: tuple[OutputFile, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    plan: str = ""  # where the weights were
    progress: float = 0.0  # percent, the most that was ever reached; only a completed task is at 100
    steps_done: int = 0  # denoising steps, over all runs
    phase: str = ""  # loading, encoding … while it runs

    def record(self) -> str:
        """This task as JSON, for the journal."""
        return json.dumps(asdict(self), default=str)  # a path is the only value that JSON lacks

    @classmethod
    def restore(cls, record: str) -> "Task":
        """The task that `record` came from. Raises ValueError, TypeError or LookupError if it is not one."""
        values = json.loads(record)
        job = values["job"]
        job["loras"] = tuple(Lora(Path(lora["path"]), tuple(map(tuple, lora["phases"]))) for lora in job["loras"])
        job["inputs"] = {name: tuple(map(Path, paths)) for name, paths in job["inputs"].items()}
        values["job"] = Job(**job)
        values["status"] = Status(values["status"])
        values["warnings"] = tuple(values["warnings"])
        values["files"] = tuple(OutputFile(**file) for file in values["files"])
        return cls(**values)


def ended(task: Task, status: Status, code: str = "", sentence: str = "", **changes: Any) -> Task:
    """The version of `task` that has ended now, `error` set if there is a sentence."""
    error = {"code": code, "message": sentence} if sentence else None
    now = max(time.time(), task.started_at or task.created_at)  # the clock may have been set back
    return replace(task, status=status, finished_at=now, phase="", error=error, **changes)


def summary(task: Task) -> str:
    """What has become of a task, for the log: its state, what it was, its seconds and files, or what went wrong."""
    job, seconds = task.job, sum(task.timings.values())
    what = f"{job.width}x{job.height}, {job.frames} frames" if job.width else "sound"
    if not task.status.ended:
        return "waits again"
    if task.error:
        return f"{task.status}: {job.model}, {what}: {task.error['message']}"
    made = f"; {seconds:.1f} s; {', '.join(file.filename for file in task.files)}" if task.files else ""
    return f"{task.status}: {job.model}, {what}, {job.steps} steps{made}"


def put_back(task: Task, attempts: int) -> Task:
    """The version of `task` that waits again, with nothing done, after so many starts."""
    nothing: dict[str, Any] = {"started_at": None, "files": (), "progress": 0.0, "steps_done": 0, "phase": ""}
    return replace(task, status=Status.QUEUED, attempts=attempts, **nothing)
