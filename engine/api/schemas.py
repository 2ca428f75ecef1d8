"""The schemas of the answers: what the OpenAPI document says of them. Nothing is validated by these at run time."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from marshmallow import Schema, fields

from engine.api.answers import MAX_LISTED_CHARS
from engine.api.config import KEYS
from engine.api.fields import Open
from engine.api.requests import Settings, TaskSettings
from engine.catalog.download import Stage
from engine.queue.tasks import Status

Field = fields.Field[Any]
FIELDS: dict[Any, Callable[..., Field]] = {
    **Schema.TYPE_MAPPING,
    Path: fields.String,
    dict: fields.Dict,
    tuple[str, ...]: partial(fields.List, fields.String()),
}


def member(kind: Any, about: str, **options: Any) -> Field:
    """Return a field of a Python type, or an object by its schema."""
    make = FIELDS.get(kind) or partial(fields.Nested, kind)
    return make(metadata={"description": about, **options.pop("metadata", {})}, **options)


required = partial(member, required=True)  # what every such answer has
nullable = partial(required, allow_none=True)


def many(item: type[Schema], about: str) -> Field:
    """Return a list of objects."""
    return fields.List(fields.Nested(item), required=True, metadata={"description": about})


def table(value: type, about: str) -> Field:
    """Return a field that is an object with any names."""
    return required(dict, about, keys=fields.String(), values=FIELDS[value]())


def time_field(about: str, **options: Any) -> Field:
    """Return a time: UTC, ISO 8601, milliseconds, Z."""
    return required(str, about, metadata={"format": "date-time"}, **options)


def answer(name: str, base: type[Schema] = Open, /, **members: Field) -> type[Schema]:
    """Return the schema of a short answer: these fields after those of `base`."""
    return base.from_dict(members, name=name)


Fault = answer(
    "Fault",
    code=required(str, "For programs."),
    message=required(str, "For people: what happened, and what would help."),
)
Failure = answer("Failure", detail=required(str, "One sentence: what is wrong, and what to do."))
Health = answer("Health", status=required(str, "`healthy`, or `ready`."), timestamp=time_field("Now."))
Ready = answer("Ready", Health, warnings=required(tuple[str, ...], "What a person should look at."))
About = answer(
    "About",
    version=required(str, "Version of the server."),
    api_version=required(str, "Version of this API."),
    endpoints=table(str, "Name → method and path."),
)
ModelEntry = answer(
    "ModelEntry",
    id=required(str, "What `model_type` takes."),
    name=required(str, "Name for people."),
    description=required(str, "What it is for, in a line."),
    family=required(str, "Its family."),
    is_i2v=required(bool, "It animates a start picture."),
    is_t2v=required(bool, "A prompt alone is enough."),
    visible=required(bool, "Worth showing in a menu."),
    kind=required(str, "`video`, `image` or `audio`."),
    tasks=required(tuple[str, ...], "What it can do: t2v, i2v, flf2v, vace …"),
    installed=required(bool, "Its weights are on this machine."),
    loaded=required(bool, "It is warm: a task of it loads nothing."),
    limits=required(dict, "Size step, frame rule, sliding windows, and which inputs it takes."),
)
ModelList = answer("ModelList", models=many(ModelEntry, "All models of the catalogue."))
ModelInfo = answer(
    "ModelInfo",
    ModelEntry,
    default_settings=required(Settings, "As `/settings` answers."),
    supported_features=table(bool, "Name → true or false."),
    licence=required(str, "Licence of the weights."),
)
# What a job needs, by arithmetic; good to about a third.
Cost = answer(
    "Cost",
    memory_bytes=required(int, "Most memory in use at once: of the card, or RAM without one."),
    seconds=nullable(float, "Seconds of its own work, by history or by the plan; null if neither is sure."),
    plan=required(str, "Where the weights will be, in a line."),
)
Submitted = answer(
    "Submitted",
    task_id=nullable(int, "Grows with every task and is never used twice; null for a dry run."),
    position=nullable(int, "1: it is processed or next; null for a dry run."),
    estimated_wait=nullable(float, "Seconds until it starts; null with no history."),
    seed=required(int, "Seed of the first file."),
    warnings=required(tuple[str, ...], "What was changed or ignored."),
    status_url=nullable(str, "Where to ask how far it is; null for a dry run."),
    settings=member(dict, "Everything as it was resolved; only in a dry run."),
    estimate=member(
        Cost, "What it needs; null until a worker has measured the device; only in a dry run.", allow_none=True
    ),
    estimated_seconds=member(
        float, "Seconds of its own work; null with no history; only in a dry run.", allow_none=True
    ),
)
QueuedTask = answer(
    "QueuedTask",
    id=required(int, "Its id."),
    prompt=required(str, f"Its prompt, shortened to {MAX_LISTED_CHARS} characters."),
    status=required(str, "`processing`, `cancelling` or `queued`."),
    length=required(int, "Frames."),
    steps=required(int, "Denoising steps."),
    position=required(int, "1: it is processed or next; others count on from all that are processed."),
)
QueueState = answer(
    "QueueState",
    total_tasks=required(int, "Tasks that have not ended."),
    current_task_id=nullable(int, "The one that runs; of several, the one that started first."),
    is_processing=required(bool, "One runs."),
    paused=required(bool, "No waiting task is started."),
    held=nullable(str, "Why no waiting task is started though the queue is not paused; it goes on by itself."),
    tasks=many(QueuedTask, "In their order."),
)
FileEntry = answer(
    "FileEntry",
    filename=required(str, "Name for `/download` and `/preview`."),
    type=required(str, "`video`, `image` or `audio`."),
    size_bytes=required(int, "Size of the file."),
)
MadeFile = answer(
    "MadeFile",
    FileEntry,
    url=required(str, "Path of the download."),
    preview_url=required(str, "Path of the thumbnail."),
    width=required(int, "Pixels."),
    height=required(int, "Pixels."),
    frames=required(int, "Frames; 1 for a picture."),
    fps=required(int, "Frames a second."),
    seed=required(int, "Its own seed."),
)
TaskState = answer(
    "TaskState",
    task_id=required(int, "Its id."),
    status=required(str, "; ".join(Status)),
    progress=required(float, "Percent; only grows, and is 100 with `completed`."),
    current_step=required(int, "Denoising steps done, over all runs."),
    total_steps=required(int, "Denoising steps of all runs."),
    position=nullable(int, "1: it is processed or next; null once it has ended."),
    eta_seconds=nullable(float, "Seconds of its own work still ahead, none of them in the queue."),
    phase=nullable(str, "`loading`, `encoding`, `denoising`, `decoding` or `saving` while it runs."),
    prompt=required(str, "The whole prompt."),
    model_type=required(str, "Its model."),
    seed=required(int, "Seed of its first file."),
    settings=required(TaskSettings, "As they were resolved."),
    warnings=required(tuple[str, ...], "What was changed or ignored."),
    created_at=time_field("When it was accepted."),
    started_at=time_field("When it last started.", allow_none=True),
    finished_at=time_field("When it ended.", allow_none=True),
    timings=table(float, "Phase → seconds."),
    peak_memory_bytes=required(int, "Most memory in use at once: of the card, or else of the process."),
    memory_plan=required(str, "Where the weights were, in a line; empty until it is completed."),
    attempts=required(int, "How often it started."),
    error=nullable(Fault, "Why it failed."),
    files=many(MadeFile, "What it made, each file whole."),
)
Removed = answer(
    "Removed",
    removed_task_id=required(int, "Its id."),
    status=required(str, "`cancelled`, or `cancelling` for a task that runs: its work ends within a step."),
)
Paused = answer("Paused", paused=required(bool, "No waiting task is started."))
Moved = answer("Moved", task_id=required(int, "Its id."), position=required(int, "Where it waits now."))
Page = answer(
    "Page",
    total=required(int, "Entries of this kind in all."),
    limit=required(int, "As requested."),
    offset=required(int, "As requested."),
)
TaskPage = answer("TaskPage", Page, tasks=many(TaskState, "Newest first."))
LoraList = answer(
    "LoraList",
    model=required(str, "Id of the model."),
    family=required(str, "Its family, and the name of the folder in `loras_dir`."),
    loras=required(tuple[str, ...], "What `activated_loras` takes."),
)
LoadState = answer(
    "LoadState", model=required(str, "Its id."), loaded=required(bool, "It is warm; false: it is being loaded.")
)
Unloaded = answer("Unloaded", unloaded=required(bool, "There was something to give back."))
DownloadState = answer(
    "DownloadState",
    model=required(str, "Its id."),
    status=required(str, "`installed`; " + "; ".join(Stage)),
    progress=required(float, "Percent; 100 when everything is here."),
    downloaded_bytes=required(int, "What is here of the files that were missing."),
    total_bytes=nullable(int, "Size of those files; null until the hub has answered."),
    file=nullable(str, "The one that is being fetched."),
    error=nullable(Fault, "Why it failed."),
    started_at=time_field("When it was requested.", allow_none=True),
    finished_at=time_field("When it ended.", allow_none=True),
)
Cleared = answer("Cleared", removed_count=required(int, "How many waited."))
OutputEntry = answer(
    "OutputEntry",
    FileEntry,
    created_at=time_field("When it was made."),
    modified_at=time_field("When it was last changed."),
)
OutputPage = answer("OutputPage", Page, files=many(OutputEntry, "Newest first."))

# The configuration that clients may read, in the contract's order; the rest concerns whoever runs the machine.
PUBLIC_KEYS = (
    "save_path", "attention_mode", "profile", "transformer_quantization", "vae_config", "mmaudio_enabled",
    "default_model", "device", "devices", "context_parallel", "warm_start", "image_format", "allow_download",
    "embed_settings", "max_queue", "max_body_mb", "max_image_pixels",
)  # fmt: skip
ServerConfig = answer(
    "ServerConfig",
    **{name: required(KEYS[name].type, KEYS[name].metadata["why"]) for name in PUBLIC_KEYS},
    memory_plan=nullable(str, "Where the loaded model's weights are, a line a device; null without."),
)


@cache
def envelope(data: type[Schema]) -> type[Schema]:
    """Return the schema of the answer around `data`, which all but health, files and errors have."""
    members = {
        "success": required(bool, "`true`."),
        "message": required(str, "For people."),
        "data": fields.Nested(data, required=True),
    }
    return Open.from_dict(members, name=f"{data.__name__}Answer")
