"""A task: one accepted request and everything that becomes of it, in memory and as a row of the journal."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine.job import Job, Lora, OutputFile


class Status(StrEnum):
    """`queued → processing → completed | failed | cancelled`, by way of `cancelling`; back to `queued` only where the
    daemon ends, or the engine can't work."""

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


@dataclass(slots=True, eq=False)
class Task:
    """One version of a task: see TaskStore. Times are seconds since the epoch.

    `attempts` counts the starts, but for those of attempts that were put back.
    """

    id: int
    job: Job
    status: Status = Status.QUEUED
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    finished_at: float | None = None
    attempts: int = 0
    warnings: tuple[str, ...] = ()
    error: Mapping[str, str] | None = None  # {"code", "message"}
    files: tuple[OutputFile, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    plan: str = ""  # where the weights were
    progress: float = 0.0  # percent, the most that was ever reached; only a completed task is at 100
    steps_done: int = 0  # denoising steps, over all runs
    phase: str = ""  # loading, encoding … while it runs

    def record(self) -> dict[str, Any]:
        """This task as JSON values, for the journal."""
        record = asdict(self)
        record["job"]["loras"] = [{"path": str(lora.path), "phases": lora.phases} for lora in self.job.loras]
        record["job"]["inputs"] = {name: [str(path) for path in paths] for name, paths in self.job.inputs.items()}
        return record

    @classmethod
    def restore(cls, record: Mapping[str, Any]) -> "Task":
        """The task that `record` came from. Keys that a later version wrote raise TypeError."""
        job = dict(record["job"])
        job["loras"] = tuple(Lora(Path(lora["path"]), tuple(map(tuple, lora["phases"]))) for lora in job["loras"])
        job["inputs"] = {name: tuple(map(Path, paths)) for name, paths in job["inputs"].items()}
        plain = {
            **record,
            "job": Job(**job),
            "status": Status(record["status"]),
            "warnings": tuple(record["warnings"]),
            "files": tuple(OutputFile(**file) for file in record["files"]),
        }
        return cls(**plain)


def ended(task: Task, status: Status, code: str = "", sentence: str = "", **changes: Any) -> Task:
    """The version of `task` that has ended now, `error` set if there is a sentence."""
    error = {"code": code, "message": sentence} if sentence else None
    return replace(task, status=status, finished_at=time.time(), phase="", error=error, **changes)


def put_back(task: Task, attempts: int | None = None) -> Task:
    """The version of `task` that waits again, as if it had never started; with `attempts`, after so many starts."""
    return replace(
        task,
        status=Status.QUEUED,
        started_at=None,
        attempts=task.attempts - 1 if attempts is None else attempts,
        files=(),
        progress=0.0,
        steps_done=0,
        phase="",
    )
