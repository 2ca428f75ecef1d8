"""wangpd: a daemon that turns prompts into video with diffusers, behind the WanGP HTTP API.

One file, read top to bottom: configuration · schemas · the OpenAPI document · handlers · middlewares · make_app · main.
What is not here: torch, pixels, ffmpeg, SQL. Those live in `engine/`, and everything that needs a GPU in a process of
its own (`engine/executor.py`). Nothing happens at import.
"""

import argparse
import asyncio
import base64
import binascii
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import hmac
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import tomllib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, cast

from aiohttp import BodyPartReader, hdrs, web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp_apispec import (
    AiohttpApiSpec,
    docs,
    request_schema,
    response_schema,
)
from apispec import APISpec
from marshmallow import EXCLUDE, RAISE, Schema, ValidationError, fields, validate

from engine import capabilities
from engine.admission import CONTRACT_DEFAULTS, FURTHER_DEFAULTS, BadRequest, Media, Resolved, default_settings
from engine.admission import resolve as resolved_request
from engine.admission import settings as settings_of
from engine.catalog import loras, weights
from engine.catalog.abilities import INPUTS, TASKS
from engine.catalog.download import Download, Downloads, NoDownload, Stage, messages
from engine.catalog.models import STEP_CACHES, Catalog, Model, UnknownModel
from engine.catalog.weights import Weights
from engine.files import footage, media
from engine.files.inputs import Inputs
from engine.files.outputs import Entry, Outputs, Retention
from engine.files.thumbnails import PREVIEW_WIDTH
from engine.job import EngineConfig, EngineError, Job, Lora
from engine.planning import windows
from engine.planning.estimate import Estimate, estimate
from engine.queue.journal import Journal, JournalFault
from engine.queue.queue import (
    Busy,
    Closed,
    EngineDown,
    Full,
    KeyReused,
    NoSuchTask,
    Receipt,
    TaskQueue,
    WrongState,
)
from engine.queue.runner import Limits
from engine.queue.tasks import Status, Task
from engine.workers.local import Engine

log = logging.getLogger("wangpd")

API = "/api/v1"
API_VERSION = "1.0.0"  # of the contract
RETRY_AFTER_S = 10
SWEEP_S = 3600
HEAVY_AT_ONCE = 2
KEEPALIVE_S = 75  # longer than proxies keep a connection, short enough to end one that never sends its headers
DRAIN_S = 5  # for answers under way at a shutdown
SHOWN_PROMPT = 100  # characters of a prompt in the queue listing
MOST_TOLD = 2000  # characters of an error
SYSTEM_CONFIG = Path("/etc/wangpd/wangpd.toml")

# ---------------------------------------------------------------------------------------------------- configuration


def key(default: Any, why: str, check: Callable[[Any], Any] | None = None) -> Any:
    """A configuration key: its default, one line of why, and the rule for its value."""
    return dataclasses.field(default=default, metadata={"why": why, "check": check})


def one_of(*values: Any) -> validate.Validator:
    """The rule that a value is one of these."""
    return validate.OneOf(values, error="must be one of " + ", ".join(map(repr, values)) + ", not {input!r}")


def between(low: float, high: float) -> validate.Validator:
    """The rule that a number lies from `low` to `high`."""
    return validate.Range(low, high, error="{input} must be between {min} and {max}")


def each(check: Callable[[Any], Any]) -> Callable[[Sequence[Any]], None]:
    """The rule that holds for each value of a list."""

    def checked(values: Sequence[Any]) -> None:
        for value in values:
            check(value)

    return checked


@dataclass(frozen=True)
class Config:
    """Every key of `wangpd.toml`. Relative paths are relative to that file."""

    host: str = key(
        "127.0.0.1", "Address to listen on; 0.0.0.0 opens it to the LAN, so put a proxy with a login in front."
    )
    port: int = key(7860, "Port to listen on; 0 takes a free one and logs it.", between(0, 65535))
    save_path: Path = key(Path("outputs"), "Folder of the finished files; it alone decides what is listed and served.")
    state_path: Path = key(
        Path("state"), "Folder of the queue's journal, the input pictures, the thumbnails and the engine's caches."
    )
    loras_dir: Path = key(Path("loras"), "Folder of LoRA files, one folder a family of models.")
    models_dir: Path = key(Path("models"), "Folder of the models' weights, one folder a model, named by its id.")
    allow_download: bool = key(False, "Fetch missing weights from the Hugging Face hub when a task needs them.")
    default_model: str = key("wan_demo", "Model of a request that names none; GET /api/v1/models lists the ids.")
    device: str = key(
        "auto", "Where to generate: auto, cuda, cuda:1, mps or cpu; auto takes the best that is there.",
        validate.Regexp(r"auto$|cpu$|mps$|cuda(:\d+)?$", error="{input!r} must be auto, cuda, cuda:N, mps or cpu"),
    )  # fmt: skip
    devices: tuple[str, ...] = key(
        (), "Several devices, a worker each, such as cuda:0 and cuda:1; they share the queue. None: device alone.",
        each(validate.Regexp(r"cpu$|cuda:\d+$", error="{input!r} must be cuda:N or cpu")),
    )  # fmt: skip
    context_parallel: bool = key(
        False, "All devices compute each task together, one task at a time, instead of a task each: for large tasks."
    )
    warm_start: bool = key(
        False, "Start the worker with the daemon and load the model that was last in use, else default_model."
    )
    profile: float = key(
        0.0,
        "GPU memory: 0 chooses, 1 denoiser resident, 2 and 4 by block, 3 by part, 5 by layer, 4.5 unpinned.",
        one_of(0, 1, 2, 3, 3.5, 4, 4.5, 5),
    )
    attention_mode: str = key(
        "auto",
        "Attention kernel: auto measures, sdpa and cudnn are torch's, else flash, flash3, sage, sage2 or xformers.",
        one_of(capabilities.AUTO, *capabilities.KERNELS),
    )
    transformer_quantization: str = key(
        "none",
        "Weights of the denoisers: none as they are, int8, fp8, nf4, a user's own gguf; auto is int8 where it helps.",
        one_of(*capabilities.KINDS),
    )
    vae_config: int = key(
        0, "VAE tiles on a GPU: 1, 2, 3 for 512, 256, 128 pixels; 0 chooses by the card.", one_of(0, 1, 2, 3)
    )
    compile: bool = key(
        False, "Compile the denoisers' blocks: 1.3 to 1.4 times the speed on a GPU, after a slow first task."
    )
    convert_float32: bool = key(
        True, "Rewrite float32 weights once in the dtype they are computed in, into models_dir/.converted."
    )
    prompt_cache_mb: int = key(
        1024, "MiB on disk of what text encoders made of prompts, to reuse; 0: every prompt is read anew.",
        between(0, 10**9),
    )  # fmt: skip
    mmaudio_enabled: int = key(0, "Sound made to fit a video: 0, since diffusers has no MMAudio.", one_of(0))
    image_format: str = key("png", "Format of pictures: png, jpeg or webp.", one_of("png", "jpeg", "webp"))
    audio_format: str = key("wav", "Format of sound: wav, flac or mp3.", one_of("wav", "flac", "mp3"))
    video_crf: int = key(18, "Quality of videos: x264's CRF, lower is better and larger.", between(0, 51))
    video_preset: str = key(
        "veryfast", "Speed of the video encoder: x264's presets; slower ones make smaller files.",
        one_of("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"),
    )  # fmt: skip
    video_encoder: str = key(
        "x264", "Encoder of videos: x264, or nvenc for a card's own; where that is missing, x264 all the same.",
        one_of("x264", "nvenc"),
    )  # fmt: skip
    vae_precision: str = key(
        "auto", "Bits in which the VAE decodes: auto (16 on CUDA where that is safe), 16 or 32.",
        one_of("auto", "16", "32"),
    )  # fmt: skip
    embed_settings: bool = key(True, "Write a file's settings and seed into the file, as JSON.")
    max_queue: int = key(1000, "Tasks that may wait; one more is answered 503.", between(1, 1_000_000))
    max_body_mb: int = key(
        64, "Largest request body in MiB; base64 pictures need a third more than their files.", between(1, 2048)
    )
    max_image_pixels: int = key(
        50_000_000, "Largest input picture in pixels, so that a small file can't fill the memory.", between(1, 10**9)
    )
    max_attempts: int = key(
        2, "How often a task may start when the daemon dies under it, before it fails.", between(1, 100)
    )
    on_restart: str = key(
        "resume",
        "What becomes of a task that ran when the daemon died: resume, pause or fail; a stop puts it back.",
        one_of("resume", "pause", "fail"),
    )
    history_days: int = key(30, "Days that the record of an ended task is kept; its files stay.", between(1, 36500))
    history_count: int = key(10_000, "Records of ended tasks that are kept at most.", between(1, 10_000_000))
    cancel_grace_s: float = key(
        10.0, "Seconds that a cancelled task may take to stop before its process is ended.", between(0, 3600)
    )
    stop_grace_s: float = key(
        15.0, "Seconds that a shutdown waits for the running task; keep it under TimeoutStopSec.", between(0, 3600)
    )
    log_level: str = key(
        "info", "How much is logged: debug, info, warning or error.", one_of("debug", "info", "warning", "error")
    )
    step_timeout_s: float = key(
        600.0,
        "Seconds without progress that end a task, six times that while it loads; twenty usual steps if that is more.",
        between(1, 86400),
    )
    idle_unload_s: float = key(
        0.0, "Seconds of idleness after which all GPU memory is given back; 0: never.", between(0, 10**7)
    )
    min_free_mb: int = key(
        1024, "MiB that must be free on the disk of save_path before a task starts.", between(0, 10**9)
    )
    keep_outputs_days: float = key(0.0, "Days after which finished files are deleted; 0: never.", between(0, 36500))
    keep_outputs_mb: int = key(
        0, "MiB of finished files; the oldest beyond it are deleted; 0: no limit.", between(0, 10**9)
    )
    max_connections: int = key(500, "Connections at a time; one more is answered 503.", between(1, 100_000))
    body_timeout_s: float = key(120.0, "Seconds in which a request's body must have arrived.", between(1, 86400))
    allowed_hosts: tuple[str, ...] = key(
        (), "Names under which the daemon may be asked for, against DNS rebinding; none: any."
    )
    cors_origins: tuple[str, ...] = key((), "Origins of web pages that may use the API, such as https://example.org.")
    token_file: str = key("", "File with a token that requests must bring as Authorization: Bearer; none: no login.")
    trusted_proxies: tuple[str, ...] = key((), "Addresses of proxies whose X-Forwarded-For and -Host are believed.")
    base_path: str = key(
        "",
        "Path under which a proxy shows the daemon, such as /video; the proxy takes it off, links get it.",
        validate.Regexp(r"(/[A-Za-z0-9_.~-]+)*$", error="{input!r} must be empty or begin with /, and not end with it"),
    )
    api_only: bool = key(False, "Accepted for WanGP's sake: wangpd has no other mode than its API.")
    shown_save_path: str = "outputs"  # `save_path` as it was written, which is what /config tells

    def engines(self) -> list[EngineConfig]:
        """The part that a generation process needs, for each of them."""
        common = EngineConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(EngineConfig)})
        leads = self.devices[:1] if self.context_parallel else self.devices
        return [dataclasses.replace(common, device=device) for device in leads or (self.device,)]

    @property
    def team(self) -> tuple[str, ...]:
        """The devices that compute each task together with the first one."""
        return self.devices[1:] if self.context_parallel else ()

    def limits(self) -> Limits:
        """The part that the queue needs."""
        return Limits(
            max_queue=self.max_queue,
            max_attempts=self.max_attempts,
            on_restart=self.on_restart,
            history_count=self.history_count,
            history_s=self.history_days * 86400.0,
            step_timeout_s=self.step_timeout_s,
            idle_unload_s=self.idle_unload_s,
        )

    def retention(self) -> Retention:
        """The part that the output folder needs."""
        mib = 2**20
        return Retention(self.keep_outputs_days * 86400, self.keep_outputs_mb * mib, self.min_free_mb * mib)


KEYS = {field.name: field for field in dataclasses.fields(Config) if "why" in field.metadata}


class ConfigError(Exception):
    """The daemon can't start like this: one sentence that names the key, the value and what was wanted."""


def load_config(file: Path | None, flags: Mapping[str, Any]) -> Config:
    """The configuration of `file`, or of the first place where there is one, with `flags` winning over it.

    Raises ConfigError. Without any file the defaults hold, and paths are relative to the working directory.
    """
    path = file or next((place for place in (Path("wangpd.toml"), SYSTEM_CONFIG) if place.is_file()), None)
    values = _checked(_toml(path), str(path)) if path else {}
    base = path.parent if path else Path()
    shown = str(flags.get("save_path") or values.get("save_path", KEYS["save_path"].default))
    values = {**_checked(flags, "command line"), **{key: value for key, value in values.items() if key not in flags}}
    folders = {name: (Path() if name in flags else base, values.get(name, KEYS[name].default)) for name in FOLDERS}
    if token_file := values.get("token_file"):  # systemd's ${CREDENTIALS_DIRECTORY} may be in it
        values["token_file"] = str(Path(base, os.path.expandvars(token_file)).absolute())
    if fault := _missing(values):
        raise ConfigError(fault)
    return Config(
        **values
        | {name: Path(root, folder).absolute() for name, (root, folder) in folders.items()}
        | {"shown_save_path": shown}
    )


def _missing(values: Mapping[str, Any]) -> str:
    """What a key asks for and this machine can't do, with what helps; "" if there is nothing."""
    kind = values.get(capabilities.QUANTIZATION, capabilities.NONE)
    devices = values.get("devices") or [values.get("device", "auto")]
    faults = [capabilities.attention_fault(values.get("attention_mode", capabilities.AUTO))]
    if values.get("context_parallel"):
        faults.append(
            capabilities.team_fault(values.get("devices", ()), values.get("attention_mode", capabilities.AUTO))
        )
    if values.get("compile"):
        faults += [capabilities.compile_fault(device) for device in devices]
    return next(filter(None, faults + [capabilities.quantization_fault(kind, device) for device in devices]), "")


FOLDERS = ("save_path", "state_path", "models_dir", "loras_dir")
NOT_EMPTY = validate.Length(1, error="must not be empty")  # as a host, nothing would mean every address


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name another file with --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return dict(_config_schema().load(values))
    except ValidationError as error:
        name, sentence = first_fault(error)
        raise ConfigError(
            f"{where}: {name}: {sentence if name.partition('[')[0] in KEYS else _no_such_key(name)}"
        ) from None


def _no_such_key(name: str) -> str:
    near = difflib.get_close_matches(name, KEYS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}"
    return f"there is no such key; {hint}"


def _config_schema() -> Schema:
    def made(field: dataclasses.Field[Any]) -> fields.Field[Any]:
        kind, check = CONFIG_FIELDS[field.type], field.metadata["check"]
        required = kind is Text and field.default != ""
        return kind(validate=[check] if check else [NOT_EMPTY] if required else [])

    return Schema.from_dict({name: made(field) for name, field in KEYS.items()})(unknown=RAISE)


# ---------------------------------------------------------------------------------------------------------- schemas


class Text(fields.String):
    """A JSON string that can be written as UTF-8, which a lone surrogate can't."""

    default_error_messages = {"invalid": "{input!r} must be text in quotes", "invalid_utf8": "must be valid Unicode"}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        if not isinstance(value, str):
            raise self.make_error("invalid", input=value)
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise self.make_error("invalid_utf8")
        return value


class Whole(fields.Integer):
    """A JSON number without a fraction; `30.0` is one, `"30"` and `true` are not."""

    default_error_messages = {"invalid": "{input!r} must be a whole number", "too_large": "the number is too large"}

    def _validated(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
            raise self.make_error("invalid", input=value)
        return int(value)


class Real(fields.Float):
    """A JSON number; `"5"` and `true` are none."""

    default_error_messages = {"invalid": "{input!r} must be a number", "too_large": "the number is too large"}

    def _validated(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.make_error("invalid", input=value)
        return float(super()._validated(value))


class Flag(fields.Boolean):
    """JSON's `true` or `false`, and nothing that looks like it."""

    default_error_messages = {"invalid": "{input!r} must be true or false"}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Digits(fields.Integer):
    """A whole number in a path or a query, where everything is text."""

    default_error_messages = {"invalid": "{input!r} must be a whole number"}

    def _validated(self, value: Any) -> int:
        if not re.fullmatch(r"-?[0-9]{1,4000}", str(value)):
            raise self.make_error("invalid", input=value)
        return int(value)


class VideoLength(fields.Field[Any]):
    """Frames as a whole number, or a duration such as `"5s"`."""

    default_error_messages = {"invalid": '{input!r} must be frames from 1 to 1000, or a duration such as "5s"'}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> int | str:
        if isinstance(value, str) and re.fullmatch(DURATION, value):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 or not 1 <= value <= 1000:
            raise self.make_error("invalid", input=value)
        return int(value)


class File(fields.Field[bytes]):
    """A file in base64, with or without a `data:` prefix, standard or URL-safe alphabet; or its bytes, from a form."""

    default_error_messages = {
        "type": "must be text: the file's bytes in base64",
        "null": "must be text: the file's bytes in base64",
        "invalid": "is not valid base64; send the file's bytes in base64",
    }

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise self.make_error("type")
        text = value.partition(",")[2] if value.startswith("data:") else value
        text = "".join(text.split()).translate(URL_SAFE).rstrip("=")
        try:
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise self.make_error("invalid") from None


class Texts(fields.List[Any]):
    """A list of texts, as a tuple, so that a Config stays frozen."""

    default_error_messages = {"invalid": 'must be a list such as ["a", "b"]'}

    def __init__(self, **options: Any) -> None:
        super().__init__(Text(), **options)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        return tuple(super()._deserialize(value, attr, data, **kwargs))


CONFIG_FIELDS: Mapping[Any, type[fields.Field[Any]]] = {
    Path: Text,
    str: Text,
    bool: Flag,
    int: Whole,
    float: Real,
    tuple[str, ...]: Texts,
}
DURATION = r"[0-9]{1,4}(\.[0-9]{1,3})?s"
URL_SAFE = str.maketrans("-_", "+/")
FORMATS = {"image": "PNG, JPEG or WebP", "video": "MP4, MOV, WebM or MKV", "audio": "WAV, FLAC, MP3 or OGG"}


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


def nullable(kind: type[fields.Field[Any]], about: str) -> fields.Field[Any]:
    """A field that an answer always has, and that may be null."""
    return kind(required=True, allow_none=True, metadata={"description": about})


def time_field(about: str, **options: Any) -> fields.Field[Any]:
    """A time: UTC, ISO 8601, milliseconds, Z."""
    return fields.String(required=True, metadata={"description": about, "format": "date-time"}, **options)


class Failure(Schema):
    detail = told(fields.String, "One sentence: what is wrong, and what to do.")


class Ready(Schema):
    status = told(fields.String, "`ready`.")
    timestamp = time_field("Now.")
    warnings = told(fields.List, "What a person should look at.", cls_or_instance=fields.String())


class Health(Schema):
    status = told(fields.String, "`healthy`.")
    timestamp = time_field("Now.")


class About(Schema):
    version = told(fields.String, "Version of the server.")
    api_version = told(fields.String, "Version of this API.")
    endpoints = told(fields.Dict, "Name → method and path.", keys=fields.String(), values=fields.String())


class ModelEntry(Schema):
    id = told(fields.String, "What `model_type` takes.")
    name = told(fields.String, "Name for people.")
    description = told(fields.String, "What it is for, in a line.")
    family = told(fields.String, "Its family.")
    is_i2v = told(fields.Boolean, "It animates a start picture.")
    is_t2v = told(fields.Boolean, "A prompt alone is enough.")
    visible = told(fields.Boolean, "Worth showing in a menu.")
    kind = told(fields.String, "`video`, `image` or `audio`.")
    tasks = told(fields.List, "What it can do: t2v, i2v, flf2v, vace …", cls_or_instance=fields.String())
    installed = told(fields.Boolean, "Its weights are on this machine.")
    loaded = told(fields.Boolean, "It is warm: a task of it loads nothing.")
    limits = told(fields.Dict, "Size step, frame rule, sliding windows, and which inputs it takes.")


class ModelList(Schema):
    models = told(fields.List, "All models of the catalogue.", cls_or_instance=fields.Nested(ModelEntry))


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


class ModelInfo(ModelEntry):
    default_settings = fields.Nested(Settings, required=True, metadata={"description": "As `/settings` tells them."})
    supported_features = told(fields.Dict, "Name → true or false.", keys=fields.String(), values=fields.Boolean())
    licence = told(fields.String, "Licence of the weights.")


class Cost(Schema):
    """What a job will take, by arithmetic: good to about a third."""

    memory_bytes = told(fields.Integer, "Most memory in use at once: of the card, or RAM without one.")
    seconds = told(fields.Float, "Seconds of its own work: by history where there is one, else by the plan.")
    plan = told(fields.String, "Where the weights will lie, in a line.")


class Submitted(Schema):
    task_id = nullable(fields.Integer, "Grows with every task and is never used twice; null for a dry run.")
    position = nullable(fields.Integer, "1: it is processed or next; null for a dry run.")
    estimated_wait = nullable(fields.Float, "Seconds until it starts; null with no history.")
    seed = told(fields.Integer, "Seed of the first file.")
    warnings = told(fields.List, "What was changed or ignored.", cls_or_instance=fields.String())
    status_url = nullable(fields.String, "Where to ask how far it is; null for a dry run.")
    settings = fields.Dict(metadata={"description": "Everything as it was resolved; only in a dry run."})
    estimate = fields.Nested(
        Cost,
        allow_none=True,
        metadata={"description": "What it will take; null until a worker has measured the device; only in a dry run."},
    )
    estimated_seconds = fields.Float(
        allow_none=True, metadata={"description": "Seconds of its own work; null with no history; only in a dry run."}
    )


class QueuedTask(Schema):
    id = told(fields.Integer, "Its id.")
    prompt = told(fields.String, f"Its prompt, cut at {SHOWN_PROMPT} characters.")
    status = told(fields.String, "`processing`, `cancelling` or `queued`.")
    length = told(fields.Integer, "Frames.")
    steps = told(fields.Integer, "Denoising steps.")
    position = told(fields.Integer, "1: it is processed or next; others count on from all that are processed.")


class QueueState(Schema):
    total_tasks = told(fields.Integer, "Tasks that have not ended.")
    current_task_id = nullable(fields.Integer, "The one that runs; of several, the one that started first.")
    is_processing = told(fields.Boolean, "One runs.")
    paused = told(fields.Boolean, "No waiting task is started.")
    tasks = told(fields.List, "In their order.", cls_or_instance=fields.Nested(QueuedTask))


class MadeFile(Schema):
    filename = told(fields.String, "Name for `/download` and `/preview`.")
    type = told(fields.String, "`video`, `image` or `audio`.")
    url = told(fields.String, "Path of the download.")
    preview_url = told(fields.String, "Path of the thumbnail.")
    size_bytes = told(fields.Integer, "Size of the file.")
    width = told(fields.Integer, "Pixels.")
    height = told(fields.Integer, "Pixels.")
    frames = told(fields.Integer, "Frames; 1 for a picture.")
    fps = told(fields.Integer, "Frames a second.")
    seed = told(fields.Integer, "Its own seed.")


class Fault(Schema):
    code = told(fields.String, "For programs.")
    message = told(fields.String, "For people: what happened, and what would help.")


class TaskState(Schema):
    task_id = told(fields.Integer, "Its id.")
    status = told(fields.String, "; ".join(Status))
    progress = told(fields.Float, "Percent; only grows, and is 100 with `completed`.")
    current_step = told(fields.Integer, "Denoising steps done, over all runs.")
    total_steps = told(fields.Integer, "Denoising steps of all runs.")
    position = nullable(fields.Integer, "1: it is processed or next; null once it has ended.")
    eta_seconds = nullable(fields.Float, "Seconds of its own work still ahead, none of them in the queue.")
    phase = nullable(fields.String, "`loading`, `encoding`, `denoising`, `decoding` or `saving` while it runs.")
    prompt = told(fields.String, "The whole prompt.")
    model_type = told(fields.String, "Its model.")
    seed = told(fields.Integer, "Seed of its first file.")
    settings = fields.Nested(TaskSettings, required=True, metadata={"description": "As they were resolved."})
    warnings = told(fields.List, "What was changed or ignored.", cls_or_instance=fields.String())
    created_at = time_field("When it was accepted.")
    started_at = time_field("When it last started.", allow_none=True)
    finished_at = time_field("When it ended.", allow_none=True)
    timings = told(fields.Dict, "Phase → seconds.", keys=fields.String(), values=fields.Float())
    peak_memory_bytes = told(fields.Integer, "Most memory in use at once: of the card, or without one of the process.")
    memory_plan = told(fields.String, "Where the weights lay, in a line; empty until it is completed.")
    attempts = told(fields.Integer, "How often it started.")
    error = fields.Nested(Fault, required=True, allow_none=True, metadata={"description": "Why it failed."})
    files = told(fields.List, "What it made, each file whole.", cls_or_instance=fields.Nested(MadeFile))


class Removed(Schema):
    removed_task_id = told(fields.Integer, "Its id.")
    status = told(fields.String, "`cancelled`, or `cancelling` for a task that runs: its work ends within a step.")


class Paused(Schema):
    paused = told(fields.Boolean, "No waiting task is started.")


class Moved(Schema):
    task_id = told(fields.Integer, "Its id.")
    position = told(fields.Integer, "Where it waits now.")


class TaskPage(Schema):
    tasks = told(fields.List, "Newest first.", cls_or_instance=fields.Nested(TaskState))
    total = told(fields.Integer, "Tasks of this state in all.")
    limit = told(fields.Integer, "As asked for.")
    offset = told(fields.Integer, "As asked for.")


class LoraList(Schema):
    model = told(fields.String, "Id of the model.")
    family = told(fields.String, "Its family, and the name of the folder in `loras_dir`.")
    loras = told(fields.List, "What `activated_loras` takes.", cls_or_instance=fields.String())


class LoadState(Schema):
    model = told(fields.String, "Its id.")
    loaded = told(fields.Boolean, "It is warm; false: it is being loaded.")


class Unloaded(Schema):
    unloaded = told(fields.Boolean, "There was something to give back.")


class DownloadState(Schema):
    model = told(fields.String, "Its id.")
    status = told(fields.String, "`installed`; " + "; ".join(Stage))
    progress = told(fields.Float, "Percent; 100 when everything is here.")
    downloaded_bytes = told(fields.Integer, "What is here of the files that were missing.")
    total_bytes = nullable(fields.Integer, "All of those files; null until the hub has told.")
    file = nullable(fields.String, "The one that is being fetched.")
    error = fields.Nested(Fault, required=True, allow_none=True, metadata={"description": "Why it failed."})
    started_at = time_field("When it was asked for.", allow_none=True)
    finished_at = time_field("When it ended.", allow_none=True)


class Cleared(Schema):
    removed_count = told(fields.Integer, "How many waited.")


class OutputEntry(Schema):
    filename = told(fields.String, "Name for `/download` and `/preview`.")
    type = told(fields.String, "`video`, `image` or `audio`.")
    size_bytes = told(fields.Integer, "Size of the file.")
    created_at = time_field("When it was made.")
    modified_at = time_field("When it was last changed.")


class OutputPage(Schema):
    files = told(fields.List, "Newest first.", cls_or_instance=fields.Nested(OutputEntry))
    total = told(fields.Integer, "Files of this type in all.")
    limit = told(fields.Integer, "As asked for.")
    offset = told(fields.Integer, "As asked for.")


class ServerConfig(Schema):
    save_path = told(fields.String, "Folder of the outputs, as configured.")
    attention_mode = told(fields.String, KEYS["attention_mode"].metadata["why"])
    profile = told(fields.Float, KEYS["profile"].metadata["why"])
    transformer_quantization = told(fields.String, KEYS["transformer_quantization"].metadata["why"])
    vae_config = told(fields.Integer, KEYS["vae_config"].metadata["why"])
    mmaudio_enabled = told(fields.Integer, KEYS["mmaudio_enabled"].metadata["why"])
    default_model = told(fields.String, KEYS["default_model"].metadata["why"])
    device = told(fields.String, KEYS["device"].metadata["why"])
    devices = told(fields.List, KEYS["devices"].metadata["why"], cls_or_instance=fields.String())
    context_parallel = told(fields.Boolean, KEYS["context_parallel"].metadata["why"])
    warm_start = told(fields.Boolean, KEYS["warm_start"].metadata["why"])
    memory_plan = nullable(fields.String, "Where the loaded model's weights lie, a line a device; null without one.")
    image_format = told(fields.String, KEYS["image_format"].metadata["why"])
    allow_download = told(fields.Boolean, KEYS["allow_download"].metadata["why"])
    embed_settings = told(fields.Boolean, KEYS["embed_settings"].metadata["why"])
    max_queue = told(fields.Integer, KEYS["max_queue"].metadata["why"])
    max_body_mb = told(fields.Integer, KEYS["max_body_mb"].metadata["why"])
    max_image_pixels = told(fields.Integer, KEYS["max_image_pixels"].metadata["why"])


def envelope(data: type[Schema]) -> type[Schema]:
    """The answer around `data` that everything but health, files and errors has."""
    members = {
        "success": told(fields.Boolean, "`true`."),
        "message": told(fields.String, "For people."),
        "data": fields.Nested(data, required=True),
    }
    return Schema.from_dict(members, name=f"{data.__name__}Answer")


def first_fault(error: ValidationError) -> tuple[str, str]:
    """The first complaint of a schema: the name of the field, with its place in a list, and the sentence."""
    messages: Any = error.messages
    name, found = next(iter(messages.items()))
    while isinstance(found, Mapping):
        place, found = next(iter(found.items()))
        name = f"{name}[{place}]"
    return str(name), found[0]


# --------------------------------------------------------------------------------------------- the OpenAPI document

ERRORS = {
    400: "Bad request: the sentence names the field, the value and the rule.",
    401: "A token is asked for, and none or a wrong one came.",
    403: "Asked for under another name, or by a web page of another site.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    413: "The body is larger than `max_body_mb`.",
    416: "The file has no such range.",
    500: "A fault of the server.",
    503: "Shutting down, or the queue is full: try again after `Retry-After` seconds.",
}
ANY_BYTES: Mapping[str, Any] = {"*/*": {"schema": {}}}
FILE_ANSWERS = {
    "200": {"description": "The whole file.", "content": ANY_BYTES},
    "206": {"description": "The range that was asked for.", "content": ANY_BYTES},
    "304": {"description": "The client's copy is still right.", "content": {}},
}
JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"
FORM_CHUNK_BYTES = 2**18
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Body = tuple[dict[str, Any], "hashlib._Hash"]  # values as they were sent, and what tells them from others


def operation(
    tag: str,
    summary: str,
    answer: type[Schema] | None,
    *errors: int,
    headers: Sequence[Mapping[str, Any]] = (),
    **inputs: type[Schema],
) -> Callable[[Handler], Handler]:
    """Describe a handler: its answer, the errors that it gives besides 500, and the schemas of its inputs.

    The inputs are `path`, `query` and `body`; the checked values lie in the request under PATH, QUERY and BODY.
    """

    def describe(handler: Handler) -> Handler:
        for status in sorted({*errors, 401, 403, 500}):
            response_schema(Failure, status, description=ERRORS[status])(handler)
        if answer:
            response_schema(answer, 200, description="Done.")(handler)
        else:
            docs(responses=FILE_ANSWERS)(handler)
        for place, schema in inputs.items():
            request_schema(schema, location=LOCATIONS[place])(handler)
        about = {"tags": [tag], "summary": summary, "operationId": handler.__name__, "parameters": list(headers)}
        described: Handler = docs(**about)(handler)
        return described

    return describe


LOCATIONS = {"path": "match_info", "query": "querystring", "body": "json"}


class OpenApi(AiohttpApiSpec):  # type: ignore[misc]  # the package has no types
    """aiohttp-apispec writes Swagger 2.0; this writes OpenAPI 3.1 from the same decorators."""

    def __init__(self) -> None:
        super().__init__(url=None, title="wangpd", version=version())
        self.spec = APISpec(
            title="wangpd",
            version=version(),
            openapi_version="3.1.0",
            plugins=[self.plugin],
            info={
                "summary": "Video from prompts: the WanGP HTTP API over diffusers",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            servers=[{"url": "../"}],  # relative to this document, so right behind any proxy path
        )
        self.plugin.converter.add_attribute_function(base64_keywords)

    def document(self, app: web.Application) -> dict[str, Any]:
        """The document of all handlers that `operation` describes."""
        for route in app.router.routes():
            if route.method != hdrs.METH_HEAD and route.resource and route.resource.canonical != API:  # is API/ as well
                self._register_route(route, route.method.lower(), route.handler)
        return dict(self.spec.to_dict())

    def _update_paths(self, data: dict[str, Any], method: str, url_path: str) -> None:
        described = {name: data[name] for name in ("tags", "summary", "operationId", "parameters") if data[name]}
        for schema in data["schemas"]:
            described |= self._inputs(described.get("parameters", []), schema)
        described["responses"] = {code: self._answer(answer) for code, answer in data["responses"].items()}
        self.spec.path(path=url_path, operations={method: described})

    def _inputs(self, parameters: list[Any], schema: Mapping[str, Any]) -> dict[str, Any]:
        if schema["location"] == "json":
            return {"requestBody": {"required": True, "content": {JSON_TYPE: {"schema": schema["schema"]}}}}
        place = {"match_info": "path", "querystring": "query"}[schema["location"]]
        found = self.plugin.converter.schema2parameters(schema["schema"], location=place)
        return {"parameters": parameters + found}

    def _answer(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        content = answer["content"] if "content" in answer else {JSON_TYPE: {"schema": answer["schema"]}}
        return {"description": answer["description"], "content": content}


def base64_keywords(_converter: Any, field: fields.Field[Any], **_: Any) -> dict[str, Any]:
    """The keywords of a file, which apispec does not pass on from a field's metadata."""
    return {word: about for word, about in field.metadata.items() if word.startswith("content")}


def version() -> str:
    """The installed version of wangpd."""
    try:
        return metadata.version("wangpd")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "0"


# --------------------------------------------------------------------------------------------------------- handlers

CONFIG = web.AppKey("config", Config)
TOKEN = web.AppKey("token", bytes)  # empty: no login is asked for
CATALOG = web.AppKey("catalog", Catalog)
ENGINES = web.AppKey("engines", list[Engine])
JOURNAL = web.AppKey("journal", Journal)
QUEUE = web.AppKey("queue", TaskQueue)
OUTPUTS = web.AppKey("outputs", Outputs)
DOWNLOADS = web.AppKey("downloads", Downloads)
INPUT_FILES = web.AppKey("input_files", Inputs)
HEAVY = web.AppKey("heavy", asyncio.Semaphore)  # held while a body or a picture is decoded, which may take much memory
DOCUMENT = web.AppKey("document", dict)  # the OpenAPI document, once someone has asked for it
REQUEST_ID = web.RequestKey("request_id", str)
CLIENT = web.RequestKey("client", str)  # its address, as far as it is known
DIGEST = web.RequestKey("digest", str)  # SHA-256 of the body
BODY, QUERY, PATH = (web.RequestKey(name, dict) for name in ("body", "query", "path"))

routes = web.RouteTableDef()
KEY_CHARS = 255
IDEMPOTENCY_KEY: Mapping[str, Any] = {
    "in": "header",
    "name": "Idempotency-Key",
    "description": "The same key and body within 24 hours get the first answer again, and nothing is queued twice.",
    "schema": {"type": "string", "minLength": 1, "maxLength": KEY_CHARS},
}
# Not the queue's own words: a wrong method on those is 405, and not an id that is no number.
QUEUED_TASK = f"{API}/queue/{{task_id:(?!pause$|resume$)[^/]+}}"


def answered(message: str, data: Mapping[str, Any], **options: Any) -> web.Response:
    """The contract's envelope around `data`."""
    return web.json_response({"success": True, "message": message, "data": data}, dumps=to_json, **options)


def to_json(value: Any) -> str:
    """JSON that every parser reads: NaN and Infinity are never sent."""
    return json.dumps(value, allow_nan=False)


def iso(seconds: float | None) -> str | None:
    """Seconds since the epoch as UTC, ISO 8601 with milliseconds and Z."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@routes.get(API)
@routes.get(f"{API}/")
@operation("General", "What this is, and where everything lies", envelope(About))
async def about(request: web.Request) -> web.Response:
    endpoints = {
        route.handler.__name__: f"{route.method} {route.resource.canonical}"
        for route in request.app.router.routes()
        if hasattr(route.handler, "__apispec__") and route.resource and route.method != hdrs.METH_HEAD
    }
    return answered("WanGP API is running", {"version": version(), "api_version": API_VERSION, "endpoints": endpoints})


@routes.get(f"{API}/health")
@operation("General", "Is it there? Answers while the GPU works and while a model loads", Health)
async def health(_request: web.Request) -> web.Response:
    return web.json_response({"status": "healthy", "timestamp": iso(time.time())})


@routes.get(f"{API}/health/ready")
@operation("General", "Can it take work? 503 with the reason while it can't", Ready, 503)
async def ready(request: web.Request) -> web.Response:
    app = request.app
    reasons = [
        *app[QUEUE].faults.values(),
        app[OUTPUTS].no_room(),
        "wangpd is shutting down" if app[QUEUE].closed else "",
    ]
    if reason := next(filter(None, reasons), None):
        raise web.HTTPServiceUnavailable(text=reason)
    return web.json_response({"status": "ready", "timestamp": iso(time.time()), "warnings": remarks(app)})


def remarks(app: web.Application) -> list[str]:
    """What a person should look at, though work goes on."""
    aside = app[JOURNAL].set_aside
    lost = [f"The queue's journal could not be read and was moved to {aside.name}; its tasks are lost"] if aside else []
    return [*lost, *app[QUEUE].remarks()]


@routes.get(f"{API}/models")
@operation(
    "Models", "All models, or those of a family, for a task, that are here", envelope(ModelList), 400, query=ModelsQuery
)
async def models(request: web.Request) -> web.Response:
    app, query = request.app, request[QUERY]
    wanted = selected(app[CATALOG], query["family"], query["task"])
    entries = await asyncio.to_thread(lambda: [model_entry(app, model) for model in wanted])
    if query["installed"]:
        entries = [entry for entry in entries if entry["installed"] == (query["installed"] == "true")]
    return answered(f"Found {len(entries)} models", {"models": entries})


def selected(catalog: Catalog, family: str | None, task: str | None) -> list[Model]:
    """The models of a family, and for a task; None means any."""
    return [model for model in catalog if family in (None, model.family) and (task is None or task in model.tasks)]


def model_entry(app: web.Application, model: Model) -> dict[str, Any]:
    """What a listing says of a model. Looks at the disk for its weights."""
    return {
        "id": model.id,
        "name": model.name,
        "description": model.description,
        "family": model.family,
        "is_i2v": model.is_i2v,
        "is_t2v": model.is_t2v,
        "visible": model.visible,
        "kind": model.kind,
        "tasks": list(model.tasks),
        "installed": weights.locate(model, app[CONFIG].models_dir) is not None,
        "loaded": app[QUEUE].loaded(model.id),
        "limits": model_limits(model),
    }


@routes.get(f"{API}/models/{{model_type}}")
@operation("Models", "One model", envelope(ModelInfo), 404, path=ModelPath)
async def model_info(request: web.Request) -> web.Response:
    model = request.app[CATALOG].get(request[PATH]["model_type"])
    entry = await asyncio.to_thread(model_entry, request.app, model)
    details = {
        "default_settings": default_settings(model),
        "supported_features": model.features,
        "licence": model.licence,
    }
    return answered(f"Model info for '{model.id}'", {**entry, **details})


def model_limits(model: Model) -> dict[str, Any]:
    """The rules that `resolve` holds a request to."""
    return {
        "resolution_multiple": model.spatial_multiple,
        "max_side": model.max_side,
        "video_length": {name: getattr(model.frames, name) for name in ("step", "offset", "min", "max")},
        "sliding_window": windows.usual(model),
        "fps": model.fps,
        "inputs": {name: model.takes(name) for name in INPUTS},
        "max_image_refs": model.inputs.get("max_reference_images", 0),
    }


@routes.get(f"{API}/models/{{model_type}}/settings")
@operation(
    "Models",
    "What a request that names only a prompt gets",
    envelope(Settings),
    404,
    path=ModelPath,
)
async def model_settings(request: web.Request) -> web.Response:
    model = request.app[CATALOG].get(request[PATH]["model_type"])
    return answered(f"Default settings for '{model.id}'", default_settings(model))


@routes.post(f"{API}/models/{{model_type}}/load")
@operation("Models", "Make a model warm as soon as the engine is free", envelope(LoadState), 400, 404, path=ModelPath)
async def load_model(request: web.Request) -> web.Response:
    app = request.app
    model = app[CATALOG].get(request[PATH]["model_type"])
    await asyncio.to_thread(require_weights, model, app[CONFIG])
    loaded = app[QUEUE].load(model)
    message = f"Model '{model.id}' is loaded" if loaded else f"Model '{model.id}' is being loaded"
    return answered(message, {"model": model.id, "loaded": loaded})


@routes.post(f"{API}/models/{{model_type}}/download")
@operation(
    "Models",
    "Fetch a model's weights, beside the queue; goes on where an earlier download stopped",
    envelope(DownloadState),
    404,
    path=ModelPath,
)
async def start_download(request: web.Request) -> web.Response:
    app = request.app
    model = app[CATALOG].get(request[PATH]["model_type"])
    if await asyncio.to_thread(weights.locate, model, app[CONFIG].models_dir):
        return answered(f"Model '{model.id}' is installed", installed_state(model))
    state = download_state(app[DOWNLOADS].start(model.id))
    return answered(f"Model '{model.id}' is being downloaded", state)


@routes.get(f"{API}/models/{{model_type}}/download")
@operation("Models", "How far the download of a model is", envelope(DownloadState), 404, path=ModelPath)
async def download_progress(request: web.Request) -> web.Response:
    app = request.app
    model = app[CATALOG].get(request[PATH]["model_type"])
    if download := app[DOWNLOADS].get(model.id):
        return answered(f"Download of '{model.id}'", download_state(download))
    if await asyncio.to_thread(weights.locate, model, app[CONFIG].models_dir):
        return answered(f"Model '{model.id}' is installed", installed_state(model))
    raise web.HTTPNotFound(text=f"Model '{model.id}' is neither installed nor being downloaded; POST starts a download")


@routes.delete(f"{API}/models/{{model_type}}/download")
@operation("Models", "End a download; the next one goes on", envelope(DownloadState), 400, 404, path=ModelPath)
async def cancel_download(request: web.Request) -> web.Response:
    model = request.app[CATALOG].get(request[PATH]["model_type"])
    download = await request.app[DOWNLOADS].cancel(model.id)
    return answered(f"Download of '{model.id}' cancelled", download_state(download))


def download_state(download: Download) -> dict[str, Any]:
    """Everything that can be said of a download now."""
    return {
        "model": download.model_id,
        "status": download.stage,
        "progress": download.percent,
        "downloaded_bytes": download.done_bytes,
        "total_bytes": download.total_bytes,
        "file": download.file or None,
        "error": download.error,
        "started_at": iso(download.started_at),
        "finished_at": iso(download.finished_at),
    }


def installed_state(model: Model) -> dict[str, Any]:
    """The same for a model that nothing has to be fetched for."""
    nothing = dict.fromkeys(("total_bytes", "file", "error", "started_at", "finished_at"))
    return {"model": model.id, "status": "installed", "progress": 100.0, "downloaded_bytes": 0, **nothing}


@routes.get(f"{API}/loras")
@operation("Models", "The LoRA files for a model", envelope(LoraList), 400, 404, query=LorasQuery)
async def lora_files(request: web.Request) -> web.Response:
    app = request.app
    model = app[CATALOG].get(request[QUERY]["model"] or app[CONFIG].default_model)
    names = await asyncio.to_thread(loras.available, model, app[CONFIG].loras_dir)
    return answered(f"Found {len(names)} LoRAs", {"model": model.id, "family": model.family, "loras": names})


@routes.post(f"{API}/unload")
@operation("Models", "Give all memory of the GPU back", envelope(Unloaded), 400)
async def unload(request: web.Request) -> web.Response:
    unloaded = request.app[QUEUE].unload()
    return answered("Memory given back" if unloaded else "Nothing was loaded", {"unloaded": unloaded})


@routes.post(f"{API}/generate")
@operation(
    "Generation",
    "Queue a video",
    envelope(Submitted),
    400,
    404,
    408,
    413,
    503,
    body=GenerateRequest,
    query=GenerateQuery,
    headers=[IDEMPOTENCY_KEY],
)
async def generate(request: web.Request) -> web.Response:
    app, body = request.app, request[BODY]
    dry = request[QUERY]["dry_run"] in ("1", "true")
    key, digest = idempotency_key(request), request[DIGEST]
    if key and (replay := await app[QUEUE].replay(key, digest)):
        return accepted(app, replay)
    if not dry:
        require_room(app)  # first, so that what is refused leaves no picture behind
    async with app[HEAVY]:
        resolved = await asyncio.to_thread(resolve, app, body, not dry)
    if dry:
        return dry_run(app, resolved)
    return accepted(app, await app[QUEUE].submit(resolved.job, resolved.warnings, key=key, request=digest))


def require_room(app: web.Application) -> None:
    """Raises 503, Closed, Full or EngineDown if no task can be taken now."""
    if sentence := app[OUTPUTS].no_room():
        raise web.HTTPServiceUnavailable(text=sentence)
    app[QUEUE].require_open()


def idempotency_key(request: web.Request) -> str | None:
    """The key that makes a retry safe, or None. Raises BadRequest."""
    key = request.headers.get(IDEMPOTENCY_KEY["name"])
    if key is not None and not (1 <= len(key) <= KEY_CHARS and key.isprintable()):  # bytes that are no UTF-8 are not
        raise BadRequest(f"Idempotency-Key: it must have 1 to {KEY_CHARS} printable characters")
    return key


def accepted(app: web.Application, receipt: Receipt) -> web.Response:
    """The answer to a submission."""
    data = {**receipt.answer, "status_url": link(app, f"/status/{receipt.answer['task_id']}")}
    headers = {"Idempotency-Replayed": "true"} if receipt.replayed else {}
    return answered("Generation task added to queue", data, headers=headers)


def dry_run(app: web.Application, resolved: Resolved) -> web.Response:
    """What a submission would have come to."""
    job, queue = resolved.job, app[QUEUE]
    data = {
        "task_id": None,
        "position": None,
        "estimated_wait": queue.estimated_wait_s(),
        "estimated_seconds": queue.estimate_s(job),
        "estimate": cost(app, job),
        "seed": job.seed,
        "warnings": list(resolved.warnings),
        "status_url": None,
        "settings": settings_of(job),
    }
    return answered("Dry run: nothing was queued", data)


def cost(app: web.Application, job: Job) -> dict[str, Any] | None:
    """What the job will take; None if no device was measured, or if it fits on none."""
    try:
        found = estimated(app, job)
    except EngineError:
        return None
    if found is None:
        return None
    known_s = app[QUEUE].estimate_s(job)
    return {**vars(found), "seconds": round(found.seconds, 1) if known_s is None else known_s}


def estimated(app: web.Application, job: Job) -> Estimate | None:
    """The estimate by the memory plan. Raises EngineError if the job seems to fit nowhere."""
    config = app[CONFIG]
    return estimate(
        app[CATALOG].get(job.model),
        job,
        app[QUEUE].machines,
        profile=config.profile,
        quantization=config.transformer_quantization,
        vae_config=config.vae_config,
    )


def doubts(app: web.Application, job: Job) -> tuple[str, ...]:
    """Why a job may fail for want of memory. A warning and no refusal: an estimate may be wrong."""
    try:
        estimated(app, job)
    except EngineError as error:
        return (str(error),)
    return ()


def link(app: web.Application, path: str) -> str:
    """A path of the API as a client sees it, behind a proxy too."""
    return f"{app[CONFIG].base_path}{API}{path}"


def resolve(app: web.Application, body: Mapping[str, Any], store: bool) -> Resolved:
    """Check everything, decide everything, then with `store` keep the inputs. Blocks.

    Raises BadRequest or UnknownModel, and has written nothing then.
    """
    model = app[CATALOG].get(body.get("model_type") or app[CONFIG].default_model)
    found = require_weights(model, app[CONFIG])
    files = {name: several(body[name]) for name in INPUTS if body.get(name, []) != []}
    given = {name: checked_input(app, name, datas) for name, datas in files.items()}
    resolved = resolved_request(app[CATALOG], model, body, given)
    if body.get("activated_loras"):
        job = dataclasses.replace(resolved.job, loras=chosen_loras(app, model, resolved.job.task, found, body))
        resolved = dataclasses.replace(resolved, job=job)
    for data in (data for datas in files.values() for data in datas if store):
        app[INPUT_FILES].store(data)
    unknown = tuple(f"{name}: there is no such field, it was ignored" for name in body.get(UNKNOWN, ()))
    return dataclasses.replace(resolved, warnings=(*unknown, *resolved.warnings, *doubts(app, resolved.job)))


def chosen_loras(
    app: web.Application, model: Model, task: str, found: Weights | None, body: Mapping[str, Any]
) -> tuple[Lora, ...]:
    """The LoRAs of a request. Raises BadRequest for one that is not there or does not fit the weights."""
    if not model.pipelines[task].loras:
        raise BadRequest(f"activated_loras: model '{model.id}' takes no LoRAs; leave them out")
    if found is None:
        remedy = weights.remedy(model, app[CONFIG].models_dir)
        raise BadRequest(f"activated_loras: '{model.id}' is not installed, so nothing tells whether they fit; {remedy}")
    names, multipliers = body["activated_loras"], body.get("loras_multipliers", "")
    try:
        return loras.chosen(names, multipliers, model, app[CONFIG].loras_dir, found.folder)
    except loras.BadLora as error:
        raise BadRequest(str(error)) from None


def several(value: bytes | list[bytes]) -> tuple[bytes, ...]:
    """The files of one field."""
    return tuple(value) if isinstance(value, list) else (value,)


UNKNOWN = " unknown"  # not a name that a field can have


def require_weights(model: Model, config: Config) -> Weights | None:
    """The model's weights, or None if they are to be fetched. Raises BadRequest with what helps if they may not be."""
    if refusal := capabilities.quantization_refusal(config.transformer_quantization, model):
        raise BadRequest(refusal)
    found = weights.locate(model, config.models_dir)
    if found is None and not config.allow_download:
        remedy = weights.remedy(model, config.models_dir)
        raise BadRequest(f"model_type: '{model.id}' is not installed; {remedy}")
    return found


def checked_input(app: web.Application, name: str, datas: tuple[bytes, ...]) -> Media:
    """The input of one field, each file whole and of a size that fits in memory. Raises BadRequest."""
    about, seconds = INPUTS[name], 0.0
    for place, data in enumerate(datas):
        where = f"{name}[{place}]" if about.several else name
        try:
            seconds = length_s(data, about.kind, app[CONFIG].max_image_pixels)
        except (media.BadImage, footage.BadFootage) as error:
            raise BadRequest(f"{where}: the {WORDS[about.kind]} {error}") from None
    return Media(tuple(app[INPUT_FILES].path(data) for data in datas), seconds)


WORDS = {"image": "picture", "video": "video", "audio": "sound"}


def length_s(data: bytes, kind: str, max_pixels: int) -> float:
    """Seconds of a video or a sound, 0 of a picture, once it is known to be whole. Raises BadImage or BadFootage."""
    if kind != "image":
        return footage.check(data, kind, max_pixels)
    media.check_image(data, max_pixels)
    return 0.0


@routes.get(f"{API}/queue")
@operation("Queue", "What runs and what waits", envelope(QueueState))
async def queue_state(request: web.Request) -> web.Response:
    queue = request.app[QUEUE]
    tasks, count = queue.listing(), len(queue.at_work)
    entries = [
        {
            "id": task.id,
            "prompt": shortened(task.job.prompt),
            "status": task.status,
            "length": task.job.frames,
            "steps": task.job.steps,
            "position": place if place > count else 1,
        }
        for place, task in enumerate(tasks, start=1)
    ]
    running = queue.current
    data = {
        "total_tasks": len(tasks),
        "current_task_id": running.id if running else None,
        "is_processing": running is not None,
        "paused": queue.paused,
        "tasks": entries,
    }
    return answered(f"Queue has {len(tasks)} tasks", data)


def shortened(prompt: str) -> str:
    """The prompt, cut to what a listing shows."""
    return prompt if len(prompt) <= SHOWN_PROMPT else prompt[:SHOWN_PROMPT] + "…"


@routes.delete(f"{API}/queue")
@operation("Queue", "Take out all waiting tasks; the running one goes on", envelope(Cleared))
async def clear_queue(request: web.Request) -> web.Response:
    count = await request.app[QUEUE].clear()
    return answered(f"Cleared {count} tasks from queue", {"removed_count": count})


@routes.post(f"{API}/queue/pause")
@operation("Queue", "Start no waiting task; the running one goes on", envelope(Paused), 503)
async def pause_queue(request: web.Request) -> web.Response:
    await request.app[QUEUE].pause(True)
    return answered("Queue paused", {"paused": True})


@routes.post(f"{API}/queue/resume")
@operation("Queue", "Start waiting tasks again", envelope(Paused), 503)
async def resume_queue(request: web.Request) -> web.Response:
    await request.app[QUEUE].pause(False)
    return answered("Queue resumed", {"paused": False})


@routes.patch(QUEUED_TASK)
@operation("Queue", "Move a waiting task", envelope(Moved), 400, 404, 408, 413, 503, path=TaskPath, body=MoveRequest)
async def move_task(request: web.Request) -> web.Response:
    task_id = request[PATH]["task_id"]
    position = await request.app[QUEUE].move(task_id, request[BODY]["position"])
    return answered(f"Task {task_id} is at position {position}", {"task_id": task_id, "position": position})


@routes.post(f"{API}/queue/{{task_id}}/retry")
@operation(
    "Queue",
    "Queue an ended task again, settings, seed and pictures as they were",
    envelope(Submitted),
    400,
    404,
    503,
    path=TaskPath,
)
async def retry_task(request: web.Request) -> web.Response:
    return accepted(request.app, await request.app[QUEUE].retry(request[PATH]["task_id"]))


@routes.get(f"{API}/tasks")
@operation("Queue", "All tasks, ended ones too, newest first", envelope(TaskPage), 400, 503, query=HistoryQuery)
async def history(request: web.Request) -> web.Response:
    app, query = request.app, request[QUERY]
    status = Status(query["status"]) if query["status"] else None
    tasks, total = await app[QUEUE].history(status, query["limit"], query["offset"])
    page = [task_state(app, task) for task in tasks]
    data = {"tasks": page, "total": total, "limit": query["limit"], "offset": query["offset"]}
    return answered(f"Found {total} tasks", data)


@routes.delete(QUEUED_TASK)
@operation("Queue", "Take out a waiting task, or cancel the running one", envelope(Removed), 400, 404, path=TaskPath)
async def remove_task(request: web.Request) -> web.Response:
    task_id = request[PATH]["task_id"]
    status = await request.app[QUEUE].remove(task_id)
    message = f"Task {task_id} removed from queue" if status.ended else f"Task {task_id} is being cancelled"
    return answered(message, {"removed_task_id": task_id, "status": status})


@routes.get(f"{API}/status/{{task_id}}")
@operation("Queue", "How far a task is", envelope(TaskState), 400, 404, 503, path=TaskPath, query=StatusQuery)
async def task_status(request: web.Request) -> web.Response:
    queue, task_id, wait_s = request.app[QUEUE], request[PATH]["task_id"], request[QUERY]["wait"]
    task = await (queue.wait(task_id, wait_s) if wait_s else queue.get(task_id))
    return answered(f"Task {task.id} status", task_state(request.app, task))


def task_state(app: web.Application, task: Task) -> dict[str, Any]:
    """Everything that can be said of a task now."""
    queue = app[QUEUE]
    done, total = queue.steps_done(task)
    return {
        "task_id": task.id,
        "status": task.status,
        "progress": queue.progress_percent(task),
        "current_step": done,
        "total_steps": total,
        "position": queue.position(task),
        "eta_seconds": queue.eta_s(task),
        "phase": queue.phase(task),
        "prompt": task.job.prompt,
        "model_type": task.job.model,
        "seed": task.job.seed,
        "settings": settings_of(task.job),
        "warnings": list(task.warnings),
        "created_at": iso(task.created_at),
        "started_at": iso(task.started_at),
        "finished_at": iso(task.finished_at),
        "timings": {phase: round(seconds, 3) for phase, seconds in task.timings.items()},
        "peak_memory_bytes": task.peak_memory_bytes,
        "memory_plan": task.plan,
        "attempts": task.attempts,
        "error": task.error,
        "files": [
            {
                **dataclasses.asdict(file),
                "url": link(app, f"/download/{file.filename}"),
                "preview_url": link(app, f"/preview/{file.filename}"),
            }
            for file in task.files
        ],
    }


@routes.get(f"{API}/outputs")
@operation("Output files", "The finished files, newest first", envelope(OutputPage), 400, query=OutputsQuery)
async def outputs(request: web.Request) -> web.Response:
    folder, query = request.app[OUTPUTS], request[QUERY]
    kind, limit, offset = query.get("file_type"), query["limit"], query["offset"]
    # From memory while nothing changed: no thread is worth that.
    entries = folder.listing(kind) if folder.fresh() else await asyncio.to_thread(folder.listing, kind)
    page = [output_entry(entry) for entry in entries[offset : offset + limit]]
    return answered(
        f"Found {len(entries)} files", {"files": page, "total": len(entries), "limit": limit, "offset": offset}
    )


def output_entry(entry: Entry) -> dict[str, Any]:
    """A file as the listing tells it."""
    return {
        "filename": entry.filename,
        "type": entry.type,
        "size_bytes": entry.size_bytes,
        "created_at": iso(entry.created_at),
        "modified_at": iso(entry.modified_at),
    }


class MediaFile(web.FileResponse):
    """A file with everything that HTTP knows of ranges; aiohttp's own compares `If-Range` by date only."""

    def __init__(self, path: Path, about: os.stat_result, headers: Mapping[str, str]) -> None:
        super().__init__(path, headers=headers)
        self._about = about

    async def prepare(self, request: web.BaseRequest) -> Any:
        headers = request.headers.copy()
        headers.popall(hdrs.ACCEPT_ENCODING, None)  # a `name.mp4.gz` that lies there by chance is not this file
        if not range_counts(request, self._about):
            headers.popall(hdrs.RANGE, None)  # another version of the file: the client needs the whole
        return await super().prepare(cast(web.Request, request).clone(headers=headers))


def range_counts(request: web.BaseRequest, about: os.stat_result) -> bool:
    """True without `If-Range`, or with one that names this version of the file by its ETag or its date."""
    condition = request.headers.get(hdrs.IF_RANGE)
    if condition is None or condition == f'"{about.st_mtime_ns:x}-{about.st_size:x}"':  # as aiohttp makes it
        return True
    date = None if '"' in condition else cast(web.Request, request).if_range
    return date is not None and about.st_mtime <= date.timestamp()


@routes.get(f"{API}/download/{{filename}}")
@operation("Output files", "A file; ranges, conditions and HEAD as HTTP has them", None, 404, 416, path=FilePath)
async def download(request: web.Request) -> web.StreamResponse:
    path = found(request)
    try:
        about = path.stat()
    except FileNotFoundError:
        raise gone(path) from None
    if range_counts(request, about):
        require_range(request, about.st_size)
    kind = media.MEDIA_TYPES[path.suffix.lower()][1]
    disposition = f'inline; filename="{re.sub(r"[^ -!#-~]", "_", path.name)}"'
    return MediaFile(path, about, {hdrs.CONTENT_TYPE: kind, hdrs.CONTENT_DISPOSITION: disposition})


def found(request: web.Request) -> Path:
    """The output file that the path names. Raises 404."""
    name = request[PATH]["filename"]
    path = request.app[OUTPUTS].find(name)
    if path is None:
        raise web.HTTPNotFound(text=f"File '{shortened(name)}' not found; GET {API}/outputs lists those there are")
    return path


def gone(path: Path) -> web.HTTPException:
    """The error for a file that was there a moment ago."""
    return web.HTTPNotFound(text=f"File '{path.name}' not found; it was removed just now")


def require_range(request: web.Request, size: int) -> None:
    """Raises 416 with its reason if the range lies outside the file."""
    try:
        start = request.http_range.start
    except ValueError:
        start = size
    if re.fullmatch(r"bytes=-0+", request.headers.get(hdrs.RANGE, "")):
        start = size  # the last 0 bytes, which aiohttp takes for the whole file
    if start is not None and start >= size:
        raise no_such_range(size)


def no_such_range(size: int) -> web.HTTPException:
    """The error for a range outside a file of `size` bytes."""
    error = web.HTTPRequestRangeNotSatisfiable(text=f"Range: the file has {size} bytes, no such range in it")
    error.headers[hdrs.CONTENT_RANGE] = f"bytes */{size}"
    return error


def in_memory(request: web.Request, body: bytes, content_type: str) -> web.Response:
    """What MediaFile does, for bytes in hand: validator, conditions and ranges. Raises 416."""
    etag = hashlib.sha256(body).hexdigest()[:32]
    headers = {hdrs.ETAG: f'"{etag}"', hdrs.ACCEPT_RANGES: "bytes"}
    if any(known.value in (etag, "*") for known in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    whole = web.Response(body=body, content_type=content_type, headers=headers)
    if request.headers.get(hdrs.IF_RANGE, f'"{etag}"') != f'"{etag}"':
        return whole
    require_range(request, len(body))
    wanted = request.http_range
    if wanted.start is None:
        return whole
    start, stop, _ = wanted.indices(len(body))
    headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{stop - 1}/{len(body)}"
    return web.Response(status=206, body=body[start:stop], content_type=content_type, headers=headers)


@routes.get(f"{API}/preview/{{filename}}")
@operation(
    "Output files",
    "A JPEG of a picture or of a video's first frame",
    None,
    400,
    404,
    416,
    path=FilePath,
    query=PreviewQuery,
)
async def preview(request: web.Request) -> web.StreamResponse:
    path = found(request)
    try:
        thumbnail = await asyncio.to_thread(request.app[OUTPUTS].thumbnail, path, request[QUERY]["width"])
    except media.NoPreview as error:
        raise BadRequest(str(error)) from None
    except FileNotFoundError:
        raise gone(path) from None
    return in_memory(request, thumbnail, "image/jpeg")


@routes.get(f"{API}/config")
@operation("Configuration", "The configuration, less what is nobody's business", envelope(ServerConfig))
async def server_config(request: web.Request) -> web.Response:
    config, plans = request.app[CONFIG], request.app[QUEUE].plans
    shown = {name: getattr(config, name) for name in ServerConfig().fields if name in KEYS}
    shown["memory_plan"] = "\n".join(plans) or None
    profile = int(config.profile) if config.profile.is_integer() else config.profile  # 1, as WanGP writes it
    return answered("Server configuration", {**shown, "profile": profile, "save_path": config.shown_save_path})


# Both viewers lie in the package aiohttp-swagger3; nothing of it is imported, and nothing is fetched from elsewhere.
VIEWERS = {
    "docs": ("swagger_ui", "swagger-ui.css", "swagger-ui-bundle.js"),
    "redoc": ("redoc_ui", "google-fonts.css", "redoc.standalone.js"),
}
START_SCRIPTS = {
    "docs": "SwaggerUIBundle({url: 'openapi.json', dom_id: '#viewer', deepLinking: true})",
    "redoc": "Redoc.init('openapi.json', {disableSearch: false}, document.getElementById('viewer'))",
}
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>wangpd API</title>
<link rel="stylesheet" href="{name}/files/{css}"><link rel="icon" href="data:,">
<body style="margin: 0"><div id="viewer"></div>
<script src="{name}/files/{script}"></script><script src="{name}/start.js"></script>
"""
PAGE_POLICY = "; ".join(
    (
        "default-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self' data:",
        "worker-src blob:",
    )
)


@routes.get("/api/openapi.json")
async def openapi_document(request: web.Request) -> web.Response:
    app = request.app
    if not app[DOCUMENT]:  # made when first asked for: it costs more than a start may
        app[DOCUMENT].update(await asyncio.to_thread(OpenApi().document, app))
    return web.json_response(app[DOCUMENT])


def add_viewers(app: web.Application) -> None:
    """Serve Swagger UI at /api/docs and ReDoc at /api/redoc, all from this machine."""
    package = importlib.util.find_spec("aiohttp_swagger3")
    assert package and package.submodule_search_locations
    root = Path(package.submodule_search_locations[0])
    for name, (folder, css, script) in VIEWERS.items():
        page = PAGE.format(name=name, css=css, script=script)
        app.router.add_get(f"/api/{name}", fixed(page, "text/html"))
        app.router.add_get(f"/api/{name}/start.js", fixed(START_SCRIPTS[name], "text/javascript"))
        app.router.add_static(f"/api/{name}/files", root / folder)


def fixed(text: str, content_type: str) -> Handler:
    """A handler that always answers `text`."""

    async def handler(_request: web.Request) -> web.Response:
        return web.Response(text=text, content_type=content_type, headers={"Content-Security-Policy": PAGE_POLICY})

    return handler


# ------------------------------------------------------------------------------------------------------ middlewares

# What an exception of the engine is in HTTP.
STATUSES: Mapping[type[Exception], type[web.HTTPException]] = {
    BadRequest: web.HTTPBadRequest,
    WrongState: web.HTTPBadRequest,
    UnknownModel: web.HTTPNotFound,
    NoSuchTask: web.HTTPNotFound,
    NoDownload: web.HTTPBadRequest,
    Busy: web.HTTPBadRequest,
    KeyReused: web.HTTPBadRequest,
    JournalFault: web.HTTPServiceUnavailable,
    EngineDown: web.HTTPServiceUnavailable,
    Closed: web.HTTPServiceUnavailable,
    Full: web.HTTPServiceUnavailable,
}


@web.middleware
async def errors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error is `{"detail": one sentence}`; what nobody foresaw is logged, and told to nobody."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return failure(request, error)
    except web.RequestPayloadError:
        return failure(request, web.HTTPBadRequest(text="The body is cut off, or not coded as its headers say"))
    except tuple(STATUSES) as error:
        return failure(request, STATUSES[type(error)](text=str(error)))
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("request %s: %s %s", request[REQUEST_ID], request.method, request.rel_url.raw_path)
        return web.json_response({"detail": "Internal server error"}, status=500)


def failure(request: web.Request, error: web.HTTPException) -> web.Response:
    """The error as JSON, with those of its headers that mean something."""
    kept = (hdrs.ALLOW, hdrs.CONTENT_RANGE, hdrs.RETRY_AFTER, hdrs.WWW_AUTHENTICATE)
    headers = {name: error.headers[name] for name in kept if name in error.headers}
    if error.status == web.HTTPServiceUnavailable.status_code:
        headers[hdrs.RETRY_AFTER] = str(RETRY_AFTER_S)
    sentence = SENTENCES[error.status](request, error) if error.status in SENTENCES else error.text
    return web.json_response({"detail": brief(sentence or error.reason)}, status=error.status, headers=headers)


def brief(sentence: str) -> str:
    """The sentence, less the middle of a value that is too long to be told again; the rule stands at the end."""
    half = MOST_TOLD // 2
    return sentence if len(sentence) <= MOST_TOLD else f"{sentence[:half]}…{sentence[-half:]}"


def no_route(request: web.Request, error: web.HTTPException) -> str | None:
    """What a 404 says: the handler's own sentence, or that there is no such path."""
    own = error.text if error.text != f"{error.status}: {error.reason}" else None
    return own or f"There is no {request.path}; GET {API}/ lists what there is"


SENTENCES: Mapping[int, Callable[[web.Request, web.HTTPException], str | None]] = {
    404: no_route,
    405: lambda request, error: f"{request.method} is not allowed here; allowed: {error.headers.get(hdrs.ALLOW, '')}",
    413: lambda request, _: f"The body is larger than {request.app[CONFIG].max_body_mb} MiB (max_body_mb)",
}


@web.middleware
async def validation_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check path, query and body by the schemas of the handler, and leave the values in the request."""
    for described in getattr(request.match_info.handler, "__schemas__", ()):
        key, read = SOURCES[described["location"]]
        try:
            request[key] = await read(request, described["schema"])
        except ValidationError as error:
            raise BadRequest(": ".join(first_fault(error))) from None
    return await handler(request)


async def read_body(request: web.Request, schema: Schema) -> dict[str, Any]:
    """The object that was sent, as JSON or as a form; request[DIGEST] tells it from others.

    Raises BadRequest or ValidationError; a body that is too large raises 413.
    """
    read = READERS.get(request.content_type)
    if read is None:  # also keeps a web page from posting plain text across sites
        raise BadRequest(f"Content-Type: '{request.content_type}' must be {JSON_TYPE} or {FORM_TYPE}")
    if (request.content_length or 0) > largest_bytes(request):
        raise web.HTTPRequestEntityTooLarge(largest_bytes(request))
    try:
        async with asyncio.timeout(request.app[CONFIG].body_timeout_s):
            body = await read(request, schema)
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="The body did not arrive within body_timeout_s seconds") from None
    async with request.app[HEAVY]:
        checked, request[DIGEST] = await asyncio.to_thread(checked_body, body, schema)
    return checked


def checked_body(body: Callable[[], Body], schema: Schema) -> tuple[dict[str, Any], str]:
    """The checked values and the SHA-256 of the body. Blocks."""
    values, digest = body()
    return loaded(schema, values), digest.hexdigest()


def largest_bytes(request: web.Request) -> int:
    """The most that a body may hold."""
    return request.app[CONFIG].max_body_mb * 2**20


async def read_json(request: web.Request, _: Schema) -> Callable[[], Body]:
    """What makes a body out of the bytes that came; it blocks."""
    raw = await request.read()
    return lambda: (parsed(raw), hashlib.sha256(raw))


async def read_form(request: web.Request, schema: Schema) -> Callable[[], Body]:
    """Likewise for a form: files as they are, repeated where the field is a list, and every other value as in JSON."""
    try:
        found = [part async for part in parts(request)]
    except (ValueError, AssertionError, HttpProcessingError):
        raise broken_form() from None
    return lambda: form_body(found, schema)


def broken_form() -> BadRequest:
    """For a form that is cut off or malformed."""
    return BadRequest("The form is malformed or cut off; send it again, as curl -F does")


def form_body(found: list[tuple[str, bytes]], schema: Schema) -> Body:
    """The values of the parts. Raises BadRequest."""
    values: dict[str, Any] = {}
    digest = hashlib.sha256()  # of the parts: the boundary between them is another one each time
    for name, data in found:
        digest.update(b"%d %s %d " % (len(name), name.encode(), len(data)))
        digest.update(data)
        field = schema.fields.get(name)
        try:
            value = form_value(field, data)
        except ValueError:  # text that is no UTF-8
            raise broken_form() from None
        values[name] = [*values.get(name, []), value] if isinstance(field, fields.List) else value
    return values, digest


async def parts(request: web.Request) -> AsyncIterator[tuple[str, bytes]]:
    """Name and bytes of each part of a form. Raises 413 or ValueError."""
    left = largest_bytes(request)
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader) or not part.name:
            raise ValueError("a part without a name")
        data = bytearray()
        while chunk := await part.read_chunk(FORM_CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                raise web.HTTPRequestEntityTooLarge(largest_bytes(request))
            data += chunk
        yield part.name, bytes(data)


def form_value(field: fields.Field[Any] | None, data: bytes) -> Any:
    """A part of a form as JSON would have carried it: text stays text, 5 and true are what they look like."""
    inner = field.inner if isinstance(field, fields.List) else field
    if isinstance(inner, File):
        return data
    text = data.decode()
    if not isinstance(inner, fields.String):
        with suppress(ValueError):
            return json.loads(text, parse_constant=no_constant)
    return text


READERS: Mapping[str, Callable[[web.Request, Schema], Awaitable[Callable[[], Body]]]] = {
    JSON_TYPE: read_json,
    FORM_TYPE: read_form,
}


def parsed(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises BadRequest."""
    try:
        body = json.loads(raw, parse_constant=no_constant)
    except (ValueError, RecursionError):
        raise BadRequest('The body is not valid JSON; send an object such as {"prompt": "a cat"}') from None
    if not isinstance(body, dict):
        raise BadRequest('The body must be a JSON object such as {"prompt": "a cat"}')
    return body


def no_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(name)


def loaded(schema: Schema, values: Mapping[str, Any]) -> dict[str, Any]:
    """The checked values, less those that were null; names that the schema does not know are kept aside."""
    checked = schema.load(values, unknown=EXCLUDE)
    known = {name: value for name, value in checked.items() if value is not None or name not in values}
    unknown = [shortened(name) for name in values if name not in schema.fields]
    return {**known, UNKNOWN: unknown} if unknown else known


async def read_query(request: web.Request, schema: Schema) -> dict[str, Any]:
    """The query; of a name that is given twice, the first value. Raises ValidationError."""
    return loaded(schema, dict(reversed(list(request.query.items()))))


async def read_path(request: web.Request, schema: Schema) -> dict[str, Any]:
    """The names that the route found in the path. Raises ValidationError."""
    return loaded(schema, request.match_info)


SOURCES: Mapping[str, tuple[Any, Callable[[web.Request, Schema], Awaitable[dict[str, Any]]]]] = {
    "json": (BODY, read_body),
    "querystring": (QUERY, read_query),
    "match_info": (PATH, read_path),
}


@web.middleware
async def request_id_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request an id, the client's own if it has one, so that its lines in the log can be found."""
    sent = request.headers.get("X-Request-ID", "")
    request[REQUEST_ID] = sent if re.fullmatch(r"[!-~]{1,128}", sent) else uuid.uuid4().hex
    request[CLIENT] = forwarded(request, "X-Forwarded-For", request.remote or "-")
    return await handler(request)


@web.middleware
async def guard_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Who may ask at all: the name asked for, the web page that asks, and the token."""
    app = request.app
    if is_preflight(request):
        return web.Response(status=204)  # add_headers says the rest
    # Not `request.host`, which asks the resolver where there is no such header, and waits for it.
    host = forwarded(request, "X-Forwarded-Host", request.headers.get(hdrs.HOST, ""))
    if app[CONFIG].allowed_hosts and bare_name(host) not in map(bare_name, app[CONFIG].allowed_hosts):
        raise web.HTTPForbidden(text=f"Host: '{shortened(host)}' is none of allowed_hosts")
    if request.method not in SAFE_METHODS and from_elsewhere(request, host):
        raise web.HTTPForbidden(text="Origin: a web page of another site asked; cors_origins names those that may")
    if app[TOKEN] and needs_token(request.path) and not hmac.compare_digest(bearer(request), app[TOKEN]):
        raise web.HTTPUnauthorized(
            text="Authorization: 'Bearer TOKEN' is asked for here", headers={hdrs.WWW_AUTHENTICATE: "Bearer"}
        )
    return await handler(request)


SAFE_METHODS = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
OPEN_PATHS = frozenset({f"{API}/health", f"{API}/health/ready"})


def needs_token(path: str) -> bool:
    """True for the API itself, less the health that monitors ask for; the documentation holds no secrets."""
    return path.startswith(API) and path not in OPEN_PATHS


def forwarded(request: web.Request, header: str, own: str) -> str:
    """What a trusted proxy says of its client; of anybody else, the connection's own truth."""
    if request.remote not in request.app[CONFIG].trusted_proxies:
        return own
    return request.headers.get(header, own).rsplit(",", 1)[-1].strip()


def from_elsewhere(request: web.Request, host: str) -> bool:
    """True if a browser says that a page of another site, and none of `cors_origins`, makes this request."""
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None:
        return request.headers.get("Sec-Fetch-Site") == "cross-site"
    return origin.partition("://")[2] != host and not may_share(request)


def bare_name(host: str) -> str:
    """The name or address in a Host header, without its port, as resolvers compare it."""
    name = re.sub(r":[0-9]*$", "", host) if "]" in host or host.count(":") == 1 else host
    return name.strip("[]").rstrip(".").lower()


def may_share(request: web.Request) -> bool:
    """True if the page that asks is one of `cors_origins`."""
    allowed = request.app[CONFIG].cors_origins
    return request.headers.get(hdrs.ORIGIN) in allowed or (hdrs.ORIGIN in request.headers and "*" in allowed)


def is_preflight(request: web.Request) -> bool:
    """True if a browser asks whether an allowed page may send a request."""
    asked = hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    return request.method == hdrs.METH_OPTIONS and asked and may_share(request)


def bearer(request: web.Request) -> bytes:
    """The token that the request brings; empty if there is none."""
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return token.strip().encode(errors="surrogateescape") if scheme.lower() == "bearer" else b""


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """What every answer carries, files too: `on_response_prepare` sees those whose sending a middleware does not."""
    response.headers["X-Request-ID"] = request.get(REQUEST_ID, "-")
    response.headers["X-Content-Type-Options"] = "nosniff"
    if request.app[CONFIG].cors_origins:  # for those that get no leave too: a cache must not give them another's
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
    if may_share(request):
        response.headers.update(CORS_HEADERS | {hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: request.headers[hdrs.ORIGIN]})


CORS_HEADERS = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, HEAD, POST, PATCH, DELETE",
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "Authorization, Content-Type, Idempotency-Key, Range, X-Request-ID",
    hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: "Content-Range, ETag, Idempotency-Replayed, Retry-After, X-Request-ID",
    hdrs.ACCESS_CONTROL_MAX_AGE: "600",
}


class AccessLog(AbstractAccessLogger):
    """One short line a request, at level debug unless it failed."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        level = logging.INFO if response.status >= 500 else logging.DEBUG
        request_id = response.headers.get("X-Request-ID", "-")
        path = request.rel_url.raw_path  # still encoded: a line feed in it would forge a line of the log
        line = (request.get(CLIENT, request.remote), request.method, path, response.status, time * 1000, request_id)
        self.logger.log(level, "%s %s %s %d %.1f ms %s", *line)

    @property
    def enabled(self) -> bool:
        return self.logger.isEnabledFor(logging.INFO)


# --------------------------------------------------------------------------------------------------------- make_app


def make_app(config: Config, models: Catalog | None = None) -> web.Application:
    """The whole daemon but its socket, for production and tests alike. Lifetimes begin and end in `cleanup_ctx`."""
    app = web.Application(
        middlewares=[request_id_middleware, errors_middleware, guard_middleware, validation_middleware],
        client_max_size=config.max_body_mb * 2**20,
    )
    app[CONFIG], app[DOCUMENT], app[TOKEN] = config, {}, read_token(config)
    app[CATALOG], app[HEAVY] = read_catalog(config) if models is None else models, asyncio.Semaphore(HEAVY_AT_ONCE)
    app[OUTPUTS] = Outputs(config.save_path, config.state_path / "thumbnails", config.retention())
    app[DOWNLOADS] = Downloads(config.models_dir, config.min_free_mb * 2**20)
    app[INPUT_FILES] = Inputs(config.state_path / "inputs")
    app[ENGINES] = engines = [Engine(part, config.cancel_grace_s) for part in config.engines()]
    app[JOURNAL] = Journal(config.state_path / "journal.sqlite")
    app[QUEUE] = TaskQueue(app[JOURNAL], engines, app[CATALOG], app[OUTPUTS], config.limits())
    app.add_routes(routes)
    add_viewers(app)
    app.on_response_prepare.append(add_headers)
    app.cleanup_ctx.extend([engines_lifetime, downloads_lifetime, queue_lifetime])
    return app


def read_token(config: Config) -> bytes:
    """The token of `token_file`. Raises CantStart."""
    if not config.token_file:
        return b""
    path = Path(config.token_file)
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise CantStart(f"token_file: {path} can't be read: {error.strerror}") from None
    if not token:
        raise CantStart(f"token_file: {path} is empty; write a token into it: openssl rand -hex 32")
    return token


async def engines_lifetime(app: web.Application) -> AsyncIterator[None]:
    """The generation processes end with the daemon, whatever they do."""
    app[CONFIG].save_path.mkdir(parents=True, exist_ok=True)
    yield
    close_engines(app)


def close_engines(app: web.Application) -> None:
    """End all generation processes. Blocks briefly."""
    for engine in app[ENGINES]:
        engine.close()


async def downloads_lifetime(app: web.Application) -> AsyncIterator[None]:
    """Downloads end with the daemon; what is here of them stays."""
    yield
    await app[DOWNLOADS].close()


async def queue_lifetime(app: web.Application) -> AsyncIterator[None]:
    """The journal is open, and its tasks run."""
    await asyncio.to_thread(app[OUTPUTS].remove_all_parts)
    await app[JOURNAL].open(await asyncio.to_thread(app[OUTPUTS].highest_task_id))
    if app[JOURNAL].set_aside:
        log.error("the journal could not be read and was moved to %s; the queue starts empty", app[JOURNAL].set_aside)
    async with app[QUEUE].running(app[CONFIG].stop_grace_s):
        beside = [asyncio.create_task(work(app)) for work in (sweep, warm_up)]
        yield
        for work in beside:
            work.cancel()
    await app[JOURNAL].close()


async def warm_up(app: web.Application) -> None:
    """With `warm_start`, have the model loaded that was last in use, or the default one, if it is installed."""
    if not app[CONFIG].warm_start:
        return
    wanted = (app[QUEUE].last_model, app[CONFIG].default_model)
    for model in (app[CATALOG].get(model_id) for model_id in wanted if model_id in app[CATALOG]):
        if await asyncio.to_thread(weights.locate, model, app[CONFIG].models_dir):
            app[QUEUE].warm_up(model)
            return


async def sweep(app: web.Application) -> None:
    """Remove the input pictures that no task needs any more, now and every hour."""
    while True:
        with suppress(JournalFault, OSError):
            await asyncio.to_thread(app[INPUT_FILES].sweep, await app[JOURNAL].inputs())
        await asyncio.sleep(SWEEP_S)


# ------------------------------------------------------------------------------------------------------------- main


class CantStart(Exception):
    """This machine does not let the daemon start: one sentence that names the key, the value and the remedy."""


class Supervisor:
    """systemd's side of the daemon: READY, the queue in STATUS, and the watchdog. Silent where there is no systemd."""

    def __init__(self, queue: TaskQueue, remarks: Callable[[], Sequence[str]] = tuple) -> None:
        self._queue, self._remarks = queue, remarks
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._interval_s = float(os.environ.get("WATCHDOG_USEC", "10000000")) / 1e6 / 2

    def tell(self, *lines: str) -> None:
        """Send `lines`; systemd's absence or fault is none of the daemon's."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)  # a supervisor that hangs must not hang the event loop
            channel.sendto("\n".join(lines).encode(), address)

    def status(self) -> str:
        """What `systemctl status` shows."""
        running, tasks = self._queue.at_work, self._queue.listing()
        work = self._work(running) or ("paused" if self._queue.paused else "idle")
        return "STATUS=" + "; ".join([f"{work}, {len(tasks) - len(running)} waiting", *self._remarks()])

    def _work(self, running: Sequence[Task]) -> str:
        ids = ", ".join(str(task.id) for task in running)
        return f"task {ids} runs" if len(running) == 1 else f"tasks {ids} run" if running else ""

    async def watch(self) -> None:
        """Say again and again that the event loop turns."""
        while True:
            self.tell("WATCHDOG=1", self.status())
            await asyncio.sleep(self._interval_s)


async def serve(config: Config, models: Catalog) -> None:
    """Run until SIGTERM or SIGINT; a second one ends at once. Raises CantStart if the port is taken."""
    app = make_app(config, models)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, stop, app)
    runner = web.AppRunner(app, shutdown_timeout=DRAIN_S)
    listener = await bind(runner, config)  # first: where the port is taken, no task may start
    supervisor = Supervisor(app[QUEUE], lambda: remarks(app))
    watching = asyncio.create_task(supervisor.watch())
    try:
        await runner.setup()
        await listener.start_serving()
        host, port, *_ = listener.sockets[0].getsockname()
        log.info("wangpd %s listens on http://%s:%d%s/", version(), host, port, API)
        supervisor.tell("READY=1", supervisor.status())
        await stop.wait()
        supervisor.tell("STOPPING=1", "STATUS=stopping the running task")
        await app[QUEUE].stop(config.stop_grace_s)  # with the door open: who comes now is told to come again
    finally:
        listener.close()  # before the rest ends: a connection that is opened now would be cut off
        watching.cancel()
        await runner.cleanup()


async def bind(runner: web.AppRunner, config: Config) -> asyncio.Server:
    """Take the port, without listening yet. Raises CantStart."""
    options = {
        "keepalive_timeout": KEEPALIVE_S,
        "access_log_class": AccessLog,
        "access_log": logging.getLogger("wangpd.access"),
    }
    loop = asyncio.get_running_loop()
    try:
        return await loop.create_server(
            lambda: Connection(cast(web.Server, runner.server), config.max_connections, loop=loop, **options),
            config.host,
            config.port,
            start_serving=False,
        )
    except OSError as error:
        sentence = LISTEN_FAULTS.get(error.errno or 0, f"can't listen on {{host}}, port {{port}}: {error.strerror}")
        raise CantStart(sentence.format(host=config.host, port=config.port)) from None


class Connection(web.RequestHandler):
    """A client's connection: one too many is turned away, and what aiohttp itself refuses is refused as JSON."""

    __slots__ = ("_limit", "_server")

    def __init__(self, server: web.Server, limit: int, **options: Any) -> None:
        super().__init__(server, **options)
        self._server, self._limit = server, limit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if len(self._server.connections) < self._limit:
            super().connection_made(transport)
            return
        refusal = Refusal(f"Too many connections: {self._limit} are open (max_connections)")
        cast(asyncio.Transport, transport).set_protocol(refusal)
        refusal.connection_made(transport)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to what no middleware sees, most of it no HTTP. Raises ConnectionError where another has begun."""
        log.log(logging.DEBUG if status < 500 else logging.ERROR, "connection from %s", request.remote, exc_info=exc)
        if request.writer.output_size:
            raise ConnectionError("an answer has begun")
        response = web.json_response({"detail": NO_HTTP if status < 500 else "Internal server error"}, status=status)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer; one that was raised before any middleware, as of a wrong Expect, as JSON like the others."""
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            resp = failure(cast(web.Request, request), resp)
        return await super().finish_response(request, resp, start_time)


NO_HTTP = "The request is not valid HTTP, or a line of its head is too long"


class Refusal(asyncio.Protocol):
    """Says 503 to a connection that is one too many, without a look at what it asks."""

    def __init__(self, sentence: str) -> None:
        body = json.dumps({"detail": sentence})
        self._answer = REFUSAL.format(length=len(body), retry_after_s=RETRY_AFTER_S, body=body).encode()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)
        stream.write(self._answer)
        # Half closed: to close on a request that nobody has read would tear the answer out of the client's hands.
        stream.write_eof()
        asyncio.get_running_loop().call_later(REFUSED_S, stream.abort)


REFUSED_S = 2  # for a client that was turned away to read why
REFUSAL = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: {length}\r\n"
    "Retry-After: {retry_after_s}\r\nConnection: close\r\n\r\n{body}"
)


LISTEN_FAULTS: Mapping[int, str] = {
    errno.EADDRINUSE: "port: {port} on {host} is taken; end the program that has it, or choose another with --port",
    errno.EADDRNOTAVAIL: "host: '{host}' is no address of this machine; 127.0.0.1 and 0.0.0.0 always are",
    errno.EACCES: "port: {port} is for root; choose one above 1023 with --port",
    socket.EAI_NONAME: "host: '{host}' is neither an address nor a known name; 127.0.0.1 and 0.0.0.0 always work",
    socket.EAI_AGAIN: "host: '{host}' can't be looked up now; an address needs no looking up",
}


def on_signal(stop: asyncio.Event, app: web.Application) -> None:
    """First: no new work, and an orderly end. Again: the end."""
    if stop.is_set():
        close_engines(app)
        os._exit(1)
    app[QUEUE].close()
    stop.set()


class CommandLine(argparse.ArgumentParser):
    """Complains in one sentence, as the configuration does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"wangpd: command line: {message}; wangpd --help tells what there is\n")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Exits with code 2 if there is no such flag or value."""
    if arguments[:1] == ["models"]:
        return models_parser().parse_args(arguments[1:])
    return daemon_parser().parse_args(arguments)


def daemon_parser() -> CommandLine:
    """The command line of the daemon itself."""
    parser = CommandLine("wangpd", description="Video from prompts: the WanGP HTTP API over diffusers.")
    parser.add_argument("--config", type=Path, help="configuration; else ./wangpd.toml, then /etc/wangpd/wangpd.toml")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=int, help="port to listen on")
    parser.add_argument("--save-path", help="folder of the finished files")
    parser.add_argument("--state-path", help="folder of the queue's journal")
    parser.add_argument("--api", action="store_true", help="accepted, and changes nothing: the API is always there")
    parser.add_argument("--api-only", action="store_true", default=None, help="likewise: there is nothing else")
    parser.add_argument("--check-config", action="store_true", help="say whether the configuration is right, and end")
    parser.add_argument("--version", action="version", version=f"wangpd {version()}")
    parser.epilog = "wangpd models lists the models, wangpd models download ID fetches one; see wangpd models --help"
    parser.set_defaults(command=None)
    return parser


def models_parser() -> CommandLine:
    """The command line of `wangpd models`."""
    parser = CommandLine("wangpd models", description="The models, or with download, the weights of one.")
    parser.add_argument("--config", type=Path, help="configuration; else ./wangpd.toml, then /etc/wangpd/wangpd.toml")
    parser.add_argument("--family", help="only models of this family")
    parser.add_argument("--task", choices=list(TASKS), metavar="TASK", help=f"only models for it: {', '.join(TASKS)}")
    parser.add_argument("--installed", action="store_true", help="only models whose weights are here")
    actions = parser.add_subparsers(dest="action", metavar="download", help="fetches the weights of a model")
    fetching = actions.add_parser("download", description="Fetch what is missing; goes on where it stopped.")
    fetching.add_argument("model_id", metavar="ID", help="id of the model")
    parser.set_defaults(command="models", check_config=False)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon or a command; the exit code: 0, 1 if this machine won't have it, 2 for a wrong configuration."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    flags = {name: value for name, value in vars(options).items() if name in KEYS and value is not None}
    try:
        config = load_config(options.config, flags)
        models = read_catalog(config)
    except ConfigError as error:
        print(f"wangpd: {error}", file=sys.stderr)
        return 2
    if options.check_config:
        print("wangpd: the configuration is right")
        return 0
    if options.command:
        return run_command(options, config, models)
    logging.basicConfig(stream=sys.stderr, level=config.log_level.upper(), format="%(name)s: %(message)s")
    return started(config, models)


def run_command(options: argparse.Namespace, config: Config, models: Catalog) -> int:
    """`wangpd models …`; returns the exit code: 0, 1 if a download failed, 2 for an unknown model."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `wangpd models | head` is no fault
    if not options.action:
        print("\n".join(model_table(selected(models, options.family, options.task), config, options.installed)))
        return 0
    try:
        return download_model(models.get(options.model_id), config)
    except UnknownModel:
        print(f"wangpd: there is no model '{options.model_id}'; see: wangpd models", file=sys.stderr)
        return 2


def model_table(models: Sequence[Model], config: Config, only_installed: bool) -> list[str]:
    """A line for each model, and one above them."""
    rows = [("id", "kind", "installed", "size", "licence")]
    for model in models:
        there = weights.locate(model, config.models_dir) is not None
        if there or not only_installed:
            size = f"{model.total_bf16_bytes / 1e9:.1f} GB" if model.repo else "in the package"
            rows.append((model.id, model.kind, "yes" if there else "no", size, model.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def download_model(model: Model, config: Config) -> int:
    """Fetch what is missing of a model and say how far it is; returns the exit code. Ctrl-C ends it."""
    if weights.locate(model, config.models_dir):
        print(f"wangpd: model '{model.id}' is installed already")
        return 0
    download, shown = Download(model.id), ""
    try:
        for message in messages(model.id, config.models_dir, config.min_free_mb * 2**20):
            download.note(message)
            if download.total_bytes is not None and (line := progress_line(download)) != shown:
                print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)
                shown = line
    except KeyboardInterrupt:
        print("\nwangpd: stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    if download.error:
        print(f"wangpd: {download.error['message']}", file=sys.stderr)
        return 1
    print(f"wangpd: model '{model.id}' is installed")
    return 0


def progress_line(download: Download) -> str:
    """How far a download is, in as many characters each time."""
    done, total = download.done_bytes / 1e9, (download.total_bytes or 0) / 1e9
    return f"{download.percent:5.1f} %  {done:8.3f} of {total:.3f} GB  {download.file[-60:]:60}"


def read_catalog(config: Config) -> Catalog:
    """The models of the package and of `models_dir`. Raises ConfigError, also if it has no default model."""
    try:
        models = Catalog.load(config.models_dir)
    except (OSError, ValueError) as error:
        raise ConfigError(f"models_dir: {error}") from None
    if config.default_model not in models:
        raise ConfigError(f"default_model: {config.default_model!r} is not in the catalogue; see: wangpd models")
    return models


def started(config: Config, models: Catalog) -> int:
    """Serve until the end; returns the exit code."""
    try:
        require_folders(config)
        with only_one(config.state_path):
            asyncio.run(serve(config, models))
    except CantStart as error:
        print(f"wangpd: {error}", file=sys.stderr)
        return 1
    except (OSError, JournalFault) as error:
        print(f"wangpd: can't go on: {error}", file=sys.stderr)
        return 1
    return 0


def require_folders(config: Config) -> None:
    """Make the folders that are written to. Raises CantStart for the first that can't be."""
    for name in ("save_path", "state_path"):
        folder: Path = getattr(config, name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CantStart(f"{name}: {folder} can't be made: {error.strerror}; choose another folder") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise CantStart(f"{name}: {folder} can't be written to; give the user that runs wangpd leave, or move it")


@contextmanager
def only_one(state_path: Path) -> Iterator[None]:
    """Hold the queue's folder: a second daemon would take up the tasks of the first. Raises CantStart."""
    with (state_path / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel gives it back however the process ends
        except BlockingIOError:
            raise CantStart(f"state_path: {state_path} is in use by another wangpd; one folder, one daemon") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
