"""A task: one accepted request, its states and its results, in memory and as a record of the journal."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from engine.job import Job, Lora, OutputFile

T = TypeVar("T")


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
    def restore(cls, record: str, inputs: Path | None = None) -> "Task":
        """The task that `record` of this or of another version came from. Raises an Exception if it is not one.

        `inputs` is where the folder of the stored inputs is now.
        """
        values = json.loads(record)
        job = values["job"]
        loras = job.get("loras", ())
        job["loras"] = tuple(Lora(Path(lora["path"]), tuple(map(tuple, lora["phases"]))) for lora in loras)
        given = job.get("inputs", job.get("images", {}))  # `images` until the models took videos and sounds
        job["inputs"] = {name: tuple(_moved(Path(path), inputs) for path in paths) for name, paths in given.items()}
        values["job"] = restored(Job, job)
        if values["status"] not in list(Status):  # of a later version
            values["status"] = Status.FAILED if values.get("finished_at") else Status.QUEUED
        values["status"] = Status(values["status"])
        values["warnings"] = tuple(values.get("warnings", ()))
        values["files"] = tuple(restored(OutputFile, file) for file in values.get("files", ()))
        values["timings"] = {phase: float(seconds) for phase, seconds in values.get("timings", {}).items()}
        return restored(cls, values)


def _moved(path: Path, inputs: Path | None) -> Path:
    return inputs / path.name if inputs and path.parent.name == inputs.name else path


def restored(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a dataclass, from stored `values`; those that it does not know are ignored.

    Raises TypeError for a value that is not of its field's type, and for one that is missing and has no default.
    """
    known = {each.name: each.type for each in fields(cls) if each.name in values}  # type: ignore[arg-type]
    for name, kind in known.items():
        choice = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        plain = tuple(get_origin(each) or each for each in choice)
        if not isinstance(values[name], (*plain, int) if float in plain else plain):
            raise TypeError(f"{name} is {values[name]!r}")
    return cls(**{name: values[name] for name in known})


def unreadable(task_id: int, record: str) -> Task:
    """A task whose record can't be read: it has failed."""
    prompt = ""
    with suppress(Exception):
        prompt = str(json.loads(record)["job"]["prompt"])
    task = Task(task_id, Job("", "", prompt, "", 0, 0, 0, 0, 0, None, 0.0, None, 0))
    sentence = "The record of this task can't be read by this version of wangpd; send the task again."
    return ended(task, Status.FAILED, "unreadable", sentence)


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
