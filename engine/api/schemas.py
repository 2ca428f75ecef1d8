"""The schemas of the answers: what the OpenAPI document says of them. Nothing is validated by these at run time."""

from functools import cache
from pathlib import Path
from typing import Any

from marshmallow import Schema, fields

from engine.api.answers import MAX_LISTED_CHARS
from engine.api.config import KEYS
from engine.api.requests import Settings, TaskSettings
from engine.catalog.download import Stage
from engine.queue.tasks import Status


def required(kind: type[fields.Field[Any]], about: str, **options: Any) -> fields.Field[Any]:
    """Return a field that every such answer has."""
    return kind(required=True, metadata={"description": about}, **options)


def nullable(kind: type[fields.Field[Any]], about: str) -> fields.Field[Any]:
    """Return a field that every such answer has, and that may be null."""
    return required(kind, about, allow_none=True)


def many(item: type[fields.Field[Any]] | type[Schema], about: str) -> fields.Field[Any]:
    """Return a field that is a list."""
    inner = fields.Nested(item) if issubclass(item, Schema) else item()
    return fields.List(inner, required=True, metadata={"description": about})


def table(value: type[fields.Field[Any]], about: str) -> fields.Field[Any]:
    """Return a field that is an object with any names."""
    return required(fields.Dict, about, keys=fields.String(), values=value())


def time_field(about: str, **options: Any) -> fields.Field[Any]:
    """Return a time: UTC, ISO 8601, milliseconds, Z."""
    return fields.String(required=True, metadata={"description": about, "format": "date-time"}, **options)


def fault(about: str) -> fields.Field[Any]:
    """Return an error that may be null."""
    return fields.Nested(Fault, required=True, allow_none=True, metadata={"description": about})


class Fault(Schema):
    code = required(fields.String, "For programs.")
    message = required(fields.String, "For people: what happened, and what would help.")


class Failure(Schema):
    detail = required(fields.String, "One sentence: what is wrong, and what to do.")


class Health(Schema):
    status = required(fields.String, "`healthy`, or `ready`.")
    timestamp = time_field("Now.")


class Ready(Health):
    warnings = many(fields.String, "What a person should look at.")


class About(Schema):
    version = required(fields.String, "Version of the server.")
    api_version = required(fields.String, "Version of this API.")
    endpoints = table(fields.String, "Name → method and path.")


class ModelEntry(Schema):
    id = required(fields.String, "What `model_type` takes.")
    name = required(fields.String, "Name for people.")
    description = required(fields.String, "What it is for, in a line.")
    family = required(fields.String, "Its family.")
    is_i2v = required(fields.Boolean, "It animates a start picture.")
    is_t2v = required(fields.Boolean, "A prompt alone is enough.")
    visible = required(fields.Boolean, "Worth showing in a menu.")
    kind = required(fields.String, "`video`, `image` or `audio`.")
    tasks = many(fields.String, "What it can do: t2v, i2v, flf2v, vace …")
    installed = required(fields.Boolean, "Its weights are on this machine.")
    loaded = required(fields.Boolean, "It is warm: a task of it loads nothing.")
    limits = required(fields.Dict, "Size step, frame rule, sliding windows, and which inputs it takes.")


class ModelList(Schema):
    models = many(ModelEntry, "All models of the catalogue.")


class ModelInfo(ModelEntry):
    default_settings = fields.Nested(Settings, required=True, metadata={"description": "As `/settings` answers."})
    supported_features = table(fields.Boolean, "Name → true or false.")
    licence = required(fields.String, "Licence of the weights.")


class Cost(Schema):
    """What a job needs, by arithmetic; good to about a third."""

    memory_bytes = required(fields.Integer, "Most memory in use at once: of the card, or RAM without one.")
    seconds = required(fields.Float, "Seconds of its own work: by history where there is one, else by the plan.")
    plan = required(fields.String, "Where the weights will be, in a line.")


class Submitted(Schema):
    task_id = nullable(fields.Integer, "Grows with every task and is never used twice; null for a dry run.")
    position = nullable(fields.Integer, "1: it is processed or next; null for a dry run.")
    estimated_wait = nullable(fields.Float, "Seconds until it starts; null with no history.")
    seed = required(fields.Integer, "Seed of the first file.")
    warnings = many(fields.String, "What was changed or ignored.")
    status_url = nullable(fields.String, "Where to ask how far it is; null for a dry run.")
    settings = fields.Dict(metadata={"description": "Everything as it was resolved; only in a dry run."})
    estimate = fields.Nested(
        Cost,
        allow_none=True,
        metadata={"description": "What it needs; null until a worker has measured the device; only in a dry run."},
    )
    estimated_seconds = fields.Float(
        allow_none=True, metadata={"description": "Seconds of its own work; null with no history; only in a dry run."}
    )


class QueuedTask(Schema):
    id = required(fields.Integer, "Its id.")
    prompt = required(fields.String, f"Its prompt, shortened to {MAX_LISTED_CHARS} characters.")
    status = required(fields.String, "`processing`, `cancelling` or `queued`.")
    length = required(fields.Integer, "Frames.")
    steps = required(fields.Integer, "Denoising steps.")
    position = required(fields.Integer, "1: it is processed or next; others count on from all that are processed.")


class QueueState(Schema):
    total_tasks = required(fields.Integer, "Tasks that have not ended.")
    current_task_id = nullable(fields.Integer, "The one that runs; of several, the one that started first.")
    is_processing = required(fields.Boolean, "One runs.")
    paused = required(fields.Boolean, "No waiting task is started.")
    tasks = many(QueuedTask, "In their order.")


class MadeFile(Schema):
    filename = required(fields.String, "Name for `/download` and `/preview`.")
    type = required(fields.String, "`video`, `image` or `audio`.")
    url = required(fields.String, "Path of the download.")
    preview_url = required(fields.String, "Path of the thumbnail.")
    size_bytes = required(fields.Integer, "Size of the file.")
    width = required(fields.Integer, "Pixels.")
    height = required(fields.Integer, "Pixels.")
    frames = required(fields.Integer, "Frames; 1 for a picture.")
    fps = required(fields.Integer, "Frames a second.")
    seed = required(fields.Integer, "Its own seed.")


class TaskState(Schema):
    task_id = required(fields.Integer, "Its id.")
    status = required(fields.String, "; ".join(Status))
    progress = required(fields.Float, "Percent; only grows, and is 100 with `completed`.")
    current_step = required(fields.Integer, "Denoising steps done, over all runs.")
    total_steps = required(fields.Integer, "Denoising steps of all runs.")
    position = nullable(fields.Integer, "1: it is processed or next; null once it has ended.")
    eta_seconds = nullable(fields.Float, "Seconds of its own work still ahead, none of them in the queue.")
    phase = nullable(fields.String, "`loading`, `encoding`, `denoising`, `decoding` or `saving` while it runs.")
    prompt = required(fields.String, "The whole prompt.")
    model_type = required(fields.String, "Its model.")
    seed = required(fields.Integer, "Seed of its first file.")
    settings = fields.Nested(TaskSettings, required=True, metadata={"description": "As they were resolved."})
    warnings = many(fields.String, "What was changed or ignored.")
    created_at = time_field("When it was accepted.")
    started_at = time_field("When it last started.", allow_none=True)
    finished_at = time_field("When it ended.", allow_none=True)
    timings = table(fields.Float, "Phase → seconds.")
    peak_memory_bytes = required(fields.Integer, "Most memory in use at once: of the card, or else of the process.")
    memory_plan = required(fields.String, "Where the weights were, in a line; empty until it is completed.")
    attempts = required(fields.Integer, "How often it started.")
    error = fault("Why it failed.")
    files = many(MadeFile, "What it made, each file whole.")


class Removed(Schema):
    removed_task_id = required(fields.Integer, "Its id.")
    status = required(fields.String, "`cancelled`, or `cancelling` for a task that runs: its work ends within a step.")


class Paused(Schema):
    paused = required(fields.Boolean, "No waiting task is started.")


class Moved(Schema):
    task_id = required(fields.Integer, "Its id.")
    position = required(fields.Integer, "Where it waits now.")


class Page(Schema):
    total = required(fields.Integer, "Entries of this kind in all.")
    limit = required(fields.Integer, "As requested.")
    offset = required(fields.Integer, "As requested.")


class TaskPage(Page):
    tasks = many(TaskState, "Newest first.")


class LoraList(Schema):
    model = required(fields.String, "Id of the model.")
    family = required(fields.String, "Its family, and the name of the folder in `loras_dir`.")
    loras = many(fields.String, "What `activated_loras` takes.")


class LoadState(Schema):
    model = required(fields.String, "Its id.")
    loaded = required(fields.Boolean, "It is warm; false: it is being loaded.")


class Unloaded(Schema):
    unloaded = required(fields.Boolean, "There was something to give back.")


class DownloadState(Schema):
    model = required(fields.String, "Its id.")
    status = required(fields.String, "`installed`; " + "; ".join(Stage))
    progress = required(fields.Float, "Percent; 100 when everything is here.")
    downloaded_bytes = required(fields.Integer, "What is here of the files that were missing.")
    total_bytes = nullable(fields.Integer, "Size of those files; null until the hub has answered.")
    file = nullable(fields.String, "The one that is being fetched.")
    error = fault("Why it failed.")
    started_at = time_field("When it was requested.", allow_none=True)
    finished_at = time_field("When it ended.", allow_none=True)


class Cleared(Schema):
    removed_count = required(fields.Integer, "How many waited.")


class OutputEntry(Schema):
    filename = required(fields.String, "Name for `/download` and `/preview`.")
    type = required(fields.String, "`video`, `image` or `audio`.")
    size_bytes = required(fields.Integer, "Size of the file.")
    created_at = time_field("When it was made.")
    modified_at = time_field("When it was last changed.")


class OutputPage(Page):
    files = many(OutputEntry, "Newest first.")


# The configuration that clients may read, in the contract's order; the rest concerns whoever runs the machine.
PUBLIC_KEYS = (
    "save_path", "attention_mode", "profile", "transformer_quantization", "vae_config", "mmaudio_enabled",
    "default_model", "device", "devices", "context_parallel", "warm_start", "image_format", "allow_download",
    "embed_settings", "max_queue", "max_body_mb", "max_image_pixels",
)  # fmt: skip
ANSWER_FIELDS: dict[Any, type[fields.Field[Any]]] = {
    Path: fields.String,
    str: fields.String,
    bool: fields.Boolean,
    int: fields.Integer,
    float: fields.Float,
}


def _public(name: str) -> fields.Field[Any]:
    kind, about = KEYS[name].type, KEYS[name].metadata["why"]
    return required(ANSWER_FIELDS[kind], about) if kind in ANSWER_FIELDS else many(fields.String, about)


ServerConfig = Schema.from_dict(
    {name: _public(name) for name in PUBLIC_KEYS}
    | {"memory_plan": nullable(fields.String, "Where the loaded model's weights are, a line a device; null without.")},
    name="ServerConfig",
)


@cache
def envelope(data: type[Schema]) -> type[Schema]:
    """Return the schema of the answer around `data`, which all but health, files and errors have."""
    members = {
        "success": required(fields.Boolean, "`true`."),
        "message": required(fields.String, "For people."),
        "data": fields.Nested(data, required=True),
    }
    return Schema.from_dict(members, name=f"{data.__name__}Answer")
