"""What clients send, as marshmallow schemas: the body of `POST /generate` by the table of settings, paths and queries.

Also the settings as answers give them back, from the same table.
"""

import json
from collections.abc import Mapping
from typing import Any

from marshmallow import Schema, fields, validate

from engine.api.fields import DURATION, FIELD_OF, File, Flag, Open, Several, Size, Text, Whole, between, matches, one_of
from engine.catalog.abilities import INPUTS, TASKS
from engine.files.thumbnails import PREVIEW_WIDTH
from engine.queue.tasks import Status
from engine.settings import LENGTH, SETTINGS, Setting

Field = fields.Field[Any]
FORMATS = {"image": "PNG, JPEG or WebP", "video": "MP4, MOV, WebM or MKV", "audio": "WAV, FLAC, MP3 or OGG"}
# The settings that must be sent, with the sentences for a request without them.
REQUIRED: Mapping[str, dict[str, Any]] = {
    "prompt": {"required": "is missing; say what to show", "null": "must be text in quotes, not null"}
}
MAX_KEY_CHARS = 255
IDEMPOTENCY_KEY: Mapping[str, Any] = {
    "in": "header",
    "name": "Idempotency-Key",
    "description": "The same key and body within 24 hours get the first answer again, and nothing is queued twice.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARS},
}


def setting_field(row: Setting) -> Field:
    """The request field of a setting; null counts as left out."""
    own = "" if row.always or row.guides else ", or the model's own"
    default = "" if row.default is None else f" Default: {json.dumps(row.default)}{own}."
    metadata: dict[str, Any] = {"description": row.help + default}
    if row.example:
        metadata["examples"] = [row.example]
    if row.above_low:
        metadata |= {"exclusiveMinimum": row.low, "maximum": row.high}
    if row.pattern:
        metadata["pattern"] = f"^{row.pattern}$"
    if row.type == LENGTH:
        frames = {"type": "integer", "minimum": row.low, "maximum": row.high}
        metadata["anyOf"] = [frames, {"type": "string", "pattern": f"^{DURATION}$"}, {"type": "null"}]
    messages = REQUIRED.get(row.name)
    options: dict[str, Any] = {"required": bool(messages), "allow_none": not messages, "error_messages": messages}
    kind = Size if row.pattern else FIELD_OF[row.type]
    return kind(validate=_rules_of(row), metadata=metadata, **options)


def _rules_of(row: Setting) -> list[validate.Validator]:
    """The rules for a value of the setting, with their sentences."""
    if row.choices:
        return [one_of(*row.choices)]
    if row.pattern:
        return [matches(rf"{row.pattern}\Z", row.pattern_rule)]
    if row.above_low:
        error = "{input} must be above {min} and at most {max}"
        return [validate.Range(row.low, row.high, min_inclusive=False, error=error)]
    if row.type in (int, float):
        return [between(row.low, row.high)]
    if not row.high or row.type == LENGTH:  # which says its limits itself
        return []
    least, unit = "{min} to" if row.low else "at most", "characters" if row.type is str else "names"
    return [validate.Length(int(row.low), int(row.high), error=f"must have {least} {{max}} {unit}")]


def input_field(name: str, *, in_form: bool = False) -> Field:
    """The request field of one input: in base64, or a file in a form."""
    about = INPUTS[name]
    file = {"type": "string", "contentEncoding": "base64", "contentMediaType": f"{about.kind}/*"}
    if in_form:
        file = {"type": "string", "format": "binary"}
    description = f"{about.about} {FORMATS[about.kind]}{'' if in_form else ' in base64'}."
    if not about.several:
        return File(allow_none=not in_form, metadata={"description": description, **file})
    return Several(
        File(metadata=file),
        allow_none=not in_form,
        validate=validate.Length(max=10, error="must have at most {max} pictures"),
        metadata={"description": f"{description} At most 10, and as many as the model takes."},
        error_messages={"invalid": "must be a list of pictures in base64"},
    )


# Nothing has a default here: what a client leaves out, the model decides.
_FIELDS = {row.name: setting_field(row) for row in SETTINGS.values()}
_FILES = {name: input_field(name, in_form=True) for name in INPUTS}
GenerateRequest = Open.from_dict(_FIELDS | {name: input_field(name) for name in INPUTS}, name="GenerateRequest")
GenerateForm = Open.from_dict(_FIELDS | _FILES, name="GenerateForm")


def echo_field(row: Setting) -> Field:
    """A setting in an answer."""
    kind = Whole if row.type == LENGTH else FIELD_OF[row.type]
    return kind(required=row.always, metadata={"description": row.help})


# What a request can decide. A setting that the model does not have is absent.
Settings = Open.from_dict({row.name: echo_field(row) for row in SETTINGS.values() if not row.guides}, name="Settings")
TaskSettings = Settings.from_dict(
    {
        "model_type": fields.String(required=True, metadata={"description": "Id of the model."}),
        "task": fields.String(required=True, metadata={"description": "What the model does: t2v, i2v, flf2v, vace …"}),
        "fps": fields.Integer(metadata={"description": "Frames a second."}),
        **{name: fields.List(fields.String(), metadata={"description": "SHA-256 of each file."}) for name in INPUTS},
    },
    name="TaskSettings",
)


def parameter(kind: type[Field], about: str, *rules: validate.Validator, default: Any = None) -> Field:
    """A query parameter that may be left out. The document says its default in words: clients would send it."""
    about = about if default in (None, "") else f"{about} Default: {json.dumps(default)}."
    return kind(load_default=lambda: default, validate=list(rules), metadata={"description": about})


def query(**parameters: Field) -> type[Schema]:
    """Return the schema of a query."""
    return Schema.from_dict(parameters)


# The parameters in paths, by their names there.
PATH_FIELDS: Mapping[str, Field] = {
    "task_id": Whole(required=True, metadata={"description": "Id of the task, from the answer to `POST /generate`."}),
    "model_type": fields.String(required=True, metadata={"description": "Id of the model.", "examples": ["wan_demo"]}),
    "filename": fields.String(required=True, metadata={"description": "A name from `GET /outputs`."}),
}
DRY_RUN = "true: check and resolve everything, queue nothing, and answer with the settings."
INSTALLED = "Only models whose weights are here, or only the others."
WAIT = "Seconds to wait for the task's end; the answer comes as soon as it has ended."
WIDTH = "Width in pixels; a smaller source is not enlarged."
MOST = between(1, 200)
AT_LEAST = "{input} must be {min} or more"
LorasQuery = query(model=parameter(Text, "Id of the model; left out, the configured one.", default=""))
GenerateQuery = query(dry_run=parameter(Flag, DRY_RUN, default=False))
StatusQuery = query(wait=parameter(Whole, WAIT, between(1, 60)))
PreviewQuery = query(width=parameter(Whole, WIDTH, between(32, 1920), default=PREVIEW_WIDTH))

ModelsQuery = query(
    family=parameter(fields.String, "Only models of this family."),
    task=parameter(fields.String, "Only models that do this.", one_of(*TASKS)),
    installed=parameter(Flag, INSTALLED),
)
HistoryQuery = query(
    status=parameter(fields.String, "Only tasks in this state.", one_of(*(status.value for status in Status))),
    limit=parameter(Whole, "Most tasks to return.", MOST, default=50),
    offset=parameter(Whole, "Tasks to leave out first.", between(0, 2**31), default=0),
)
OutputsQuery = query(
    limit=parameter(Whole, "Most files to return.", MOST, default=50),
    offset=parameter(Whole, "Files to leave out first.", validate.Range(0, error=AT_LEAST), default=0),
    file_type=parameter(fields.String, "Only files of this type.", one_of("video", "image", "audio")),
)


class MoveRequest(Open):
    """The body of `PATCH /queue/{task_id}`."""

    position = Whole(
        required=True,
        validate=between(1, 10**6),
        metadata={"description": "Where it should wait: 1 is processed or next. Beyond the end means the end."},
        error_messages={"required": "is missing; say at which position it shall wait", "null": "must be a number"},
    )


# What the document says of a body besides its schema: one that can be sent as it is, and the same as a form.
EXAMPLES: Mapping[type[Schema], Mapping[str, Any]] = {
    GenerateRequest: {"prompt": SETTINGS["prompt"].example},
    MoveRequest: {"position": 1},
}
FORMS: Mapping[type[Schema], type[Schema]] = {GenerateRequest: GenerateForm}
