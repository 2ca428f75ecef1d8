"""Interim: requests."""

from typing import Any

from marshmallow import EXCLUDE, Schema, fields, validate

from engine.admission import CONTRACT_DEFAULTS, FURTHER_DEFAULTS
from engine.api.fields import (
    DURATION,
    FORMATS,
    Digits,
    File,
    Flag,
    Real,
    Text,
    VideoLength,
    Whole,
    between,
    one_of,
)
from engine.catalog.abilities import INPUTS, TASKS
from engine.catalog.models import STEP_CACHES
from engine.files.thumbnails import PREVIEW_WIDTH
from engine.queue.tasks import Status


def optional(kind: type[fields.Field[Any]], about: str, *checks: Any, **metadata: Any) -> fields.Field[Any]:
    """A request field that may be left out; null counts as left out."""
    return kind(allow_none=True, validate=list(checks), metadata={"description": about, **metadata})


DEFAULTS = CONTRACT_DEFAULTS
IF_MODEL_HAS_NONE = "Default where neither the client nor the model says anything."


class GenerateSettings(Schema):
    """The words and numbers of `POST /generate`.

    Nothing has a default here: what a client leaves out is the model's to say.
    """

    class Meta:
        unknown = EXCLUDE  # ignored, and named in the answer's warnings

    prompt = Text(
        required=True,
        validate=validate.Length(1, 10_000, error="must have {min} to {max} characters"),
        metadata={"description": "What to show.", "examples": ["A beautiful sunset over the ocean"]},
        error_messages={"required": "is missing; say what to show", "null": "must be text in quotes, not null"},
    )
    negative_prompt = optional(
        Text, "What to avoid.", validate.Length(max=10_000, error="must have at most {max} characters"), default=""
    )
    model_type = optional(Text, "Id of the model; left out, the configured `default_model`.", examples=["wan_demo"])
    resolution = optional(
        Text,
        f"WIDTHxHEIGHT in pixels, each a multiple of the model's size step. {IF_MODEL_HAS_NONE}",
        validate.Regexp(r"[0-9]{1,5}x[0-9]{1,5}\Z", error="{input!r} must be WIDTHxHEIGHT in pixels, such as 832x480"),
        pattern="^[0-9]{1,5}x[0-9]{1,5}$",
        default=DEFAULTS["resolution"],
    )
    video_length = optional(
        VideoLength,
        f'Frames, or a duration such as "5s"; rounded to what the model can make, with a warning. {IF_MODEL_HAS_NONE}',
        default=DEFAULTS["video_length"],
        anyOf=[
            {"type": "integer", "minimum": 1, "maximum": 1000},
            {"type": "string", "pattern": f"^{DURATION}$"},
            {"type": "null"},
        ],
    )
    num_inference_steps = optional(
        Whole, f"Denoising steps. {IF_MODEL_HAS_NONE}", between(1, 100), default=DEFAULTS["num_inference_steps"]
    )
    guidance_scale = optional(
        Real, f"Classifier-free guidance. {IF_MODEL_HAS_NONE}", between(0, 20), default=DEFAULTS["guidance_scale"]
    )
    guidance2_scale = optional(
        Real, "Guidance of the second, low-noise expert of a model that has one (Wan 2.2 A14B).", between(0, 20)
    )
    embedded_guidance_scale = optional(
        Real, "Guidance that a distilled model takes as an input.", between(0, 20), default=0
    )
    flow_shift = optional(
        Real,
        f"Shift of the noise schedule. {IF_MODEL_HAS_NONE}",
        validate.Range(0, 100, min_inclusive=False, error="{input} must be above 0 and at most 100"),
        default=DEFAULTS["flow_shift"],
        exclusiveMinimum=0,
        maximum=100,
    )
    seed = optional(
        Whole, "-1 draws one, which the answer tells. File i has seed + i.", between(-1, 2**63 - 1), default=-1
    )
    batch_size = optional(Whole, "Files a run.", between(1, 10), default=1)
    repeat_generation = optional(Whole, "Runs.", between(1, 10), default=1)
    use_model_defaults = optional(
        Flag, "true: what is left out takes the model's default; false: the defaults named here.", default=True
    )
    denoising_strength = optional(
        Real,
        "How much a source picture or video is changed: 0 hardly, 1 wholly.",
        between(0, 1),
        default=FURTHER_DEFAULTS["denoising_strength"],
    )
    duration_seconds = optional(
        Real, f"Length of a sound. {IF_MODEL_HAS_NONE}", between(1, 600), default=FURTHER_DEFAULTS["duration_seconds"]
    )
    lyrics = optional(Text, "What is sung.", validate.Length(max=10_000, error="must have at most {max} characters"))
    activated_loras = fields.List(
        Text(),
        allow_none=True,
        validate=validate.Length(max=20, error="must have at most {max} names"),
        metadata={"description": "LoRA files, by the names that `GET /loras` tells."},
        error_messages={"invalid": "must be a list of file names"},
    )
    loras_multipliers = optional(
        Text,
        "Strength of each LoRA, parted by spaces; 0,0.5,1 spreads values over the steps, 1;0 over two experts.",
        validate.Length(max=2000, error="must have at most {max} characters"),
        default="",
    )
    skip_steps_cache_type = optional(
        Text,
        "Step cache: mag, tea, fbc or taylorseer, as far as the model can; empty: every step is computed.",
        validate.OneOf(["", *STEP_CACHES], error="{input!r} must be empty or one of {choices}"),
        default="",
    )
    skip_steps_multiplier = optional(
        Real,
        "How many times faster the denoising shall be.",
        between(1, 4),
        default=FURTHER_DEFAULTS["skip_steps_multiplier"],
    )
    skip_steps_start_step_perc = optional(
        Real, "Percent of the steps, from the first, that are always computed.", between(0, 100), default=0
    )
    sliding_window_size = optional(
        Whole,
        "Frames that are made at once; a longer video is made window by window, as far as the model can go on from its"
        " own frames. 0: the whole video at once. Left out, as long as the model's usual video.",
        between(0, 1000),
    )
    sliding_window_overlap = optional(
        Whole, "Frames that a window shares with the one before. Left out, what suits the model.", between(1, 97)
    )
    sliding_window_color_correction_strength = optional(
        Real,
        "How far each window takes over the colours of the one before: 0 not, 1 wholly.",
        between(0, 1),
        default=FURTHER_DEFAULTS["sliding_window_color_correction_strength"],
    )
    task = optional(
        Text, "What the model shall do, where the inputs leave more than one choice.", validate.OneOf(list(TASKS))
    )


def input_field(name: str) -> fields.Field[Any]:
    """The request field of one input."""
    about = INPUTS[name]
    media_type = {"contentEncoding": "base64", "contentMediaType": f"{about.kind}/*"}
    described = f"{about.about} {FORMATS[about.kind]} in base64."
    if not about.several:
        return optional(File, described, type="string", **media_type)
    return fields.List(
        File(metadata={"type": "string", **media_type}),
        allow_none=True,
        validate=validate.Length(max=10, error="must have at most {max} pictures"),
        metadata={"description": f"{described} At most 10, and as many as the model takes."},
        error_messages={"invalid": "must be a list of pictures in base64"},
    )


GenerateRequest = GenerateSettings.from_dict({name: input_field(name) for name in INPUTS}, name="GenerateRequest")


class TaskPath(Schema):
    task_id = Digits(required=True, metadata={"description": "Id of the task, from the answer to `POST /generate`."})


class ModelPath(Schema):
    model_type = fields.String(required=True, metadata={"description": "Id of the model.", "examples": ["wan_demo"]})


class ModelsQuery(Schema):
    family = fields.String(load_default=None, metadata={"description": "Only models of this family."})
    task = fields.String(
        load_default=None,
        validate=one_of(*TASKS),
        metadata={"description": "Only models that do this.", "type": "string"},
    )
    installed = fields.String(
        load_default=None,
        validate=one_of("true", "false"),
        metadata={"description": "Only models whose weights are here, or only the others.", "type": "string"},
    )


class FilePath(Schema):
    filename = fields.String(required=True, metadata={"description": "A name from `GET /outputs`."})


class OutputsQuery(Schema):
    limit = Digits(load_default=50, validate=between(1, 200), metadata={"description": "Most files to return."})
    offset = Digits(
        load_default=0,
        validate=validate.Range(min=0, error="{input} must be 0 or more"),
        metadata={"description": "Files to leave out first."},
    )
    file_type = fields.String(
        validate=one_of("video", "image", "audio"), metadata={"description": "Only files of this type."}
    )


class GenerateQuery(Schema):
    dry_run = fields.String(
        load_default="0",
        validate=one_of("0", "1", "true", "false"),
        metadata={"description": "1: check and resolve everything, queue nothing, and answer with the settings."},
    )


class LorasQuery(Schema):
    model = Text(load_default="", metadata={"description": "Id of the model; left out, the configured one."})


class StatusQuery(Schema):
    wait = Digits(
        load_default=None,
        validate=between(1, 60),
        metadata={"description": "Seconds to wait for the task's end; the answer comes as soon as it has ended."},
    )


class HistoryQuery(Schema):
    status = fields.String(
        load_default=None,
        validate=one_of(*(status.value for status in Status)),
        metadata={"description": "Only tasks in this state.", "type": "string"},
    )
    limit = Digits(load_default=50, validate=between(1, 200), metadata={"description": "Most tasks to return."})
    offset = Digits(
        load_default=0,
        validate=validate.Range(0, 2**31, error="{input} must be between {min} and {max}"),
        metadata={"description": "Tasks to leave out first."},
    )


class MoveRequest(Schema):
    """The body of `PATCH /queue/{task_id}`."""

    position = Whole(
        required=True,
        validate=between(1, 10**6),
        metadata={"description": "Where it shall wait: 1 is processed or next. Beyond the end means the end."},
        error_messages={"required": "is missing; say at which position it shall wait", "null": "must be a number"},
    )


class PreviewQuery(Schema):
    width = Digits(
        load_default=PREVIEW_WIDTH,
        validate=between(32, 1920),
        metadata={"description": "Width in pixels; a smaller source is not enlarged."},
    )


def told(kind: type[fields.Field[Any]], about: str, **options: Any) -> fields.Field[Any]:
    """A field that an answer always has."""
    return kind(required=True, metadata={"description": about}, **options)


def described(kind: type[fields.Field[Any]], about: str, **options: Any) -> fields.Field[Any]:
    """A field that some answers have."""
    return kind(metadata={"description": about}, **options)


class Settings(Schema):
    """What a request can decide. A setting that the model does not have is absent."""

    prompt = told(fields.String, "What to show.")
    negative_prompt = described(fields.String, "What to avoid.")
    resolution = described(fields.String, "WIDTHxHEIGHT in pixels.")
    video_length = described(fields.Integer, "Frames.")
    num_inference_steps = described(fields.Integer, "Denoising steps.")
    guidance_scale = described(fields.Float, "Classifier-free guidance.")
    guidance2_scale = described(fields.Float, "Guidance of the second expert.")
    embedded_guidance_scale = described(fields.Float, "Guidance that a distilled model takes as an input.")
    flow_shift = described(fields.Float, "Shift of the noise schedule.")
    denoising_strength = described(fields.Float, "How much a source is changed.")
    duration_seconds = described(fields.Float, "Length of a sound.")
    lyrics = described(fields.String, "What is sung.")
    activated_loras = described(fields.List, "LoRA files.", cls_or_instance=fields.String())
    loras_multipliers = described(fields.String, "Strength of each LoRA.")
    skip_steps_cache_type = described(fields.String, "Step cache; empty: none.")
    skip_steps_multiplier = described(fields.Float, "How many times faster the denoising shall be.")
    skip_steps_start_step_perc = described(fields.Float, "Percent of the steps that are always computed.")
    sliding_window_size = described(fields.Integer, "Most frames of a window.")
    sliding_window_overlap = described(fields.Integer, "Frames that a window shares with the one before.")
    sliding_window_color_correction_strength = described(fields.Float, "How far colours are taken over.")
    seed = told(fields.Integer, "-1: one is drawn.")
    batch_size = told(fields.Integer, "Files a run.")
    repeat_generation = told(fields.Integer, "Runs.")


class TaskSettings(
    Settings.from_dict(  # type: ignore[misc]  # a class that is made at run time
        {name: described(fields.List, "SHA-256 of each file.", cls_or_instance=fields.String()) for name in INPUTS}
    )
):
    model_type = told(fields.String, "Id of the model.")
    task = told(fields.String, "What the model does: t2v, i2v, flf2v, vace …")
    fps = described(fields.Integer, "Frames a second.")
