"""The schemas of the answers, as `schemas.toml` lists them: what the OpenAPI document says. They validate nothing."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import rtoml
from marshmallow import Schema, fields

from engine.api.config import KEYS
from engine.api.fields import Open
from engine.api.requests import Settings, TaskSettings

Field = fields.Field[Any]
TYPES: Mapping[str, Callable[..., Field]] = {
    "str": fields.String,
    "int": fields.Integer,
    "float": fields.Float,
    "bool": fields.Boolean,
    "dict": fields.Dict,
    "time": fields.DateTime,  # UTC, ISO 8601, milliseconds, Z
}
KEY_TYPES: Mapping[Any, str] = {
    str: "str",
    Path: "str",
    bool: "bool",
    int: "int",
    float: "float",
    tuple[str, ...]: "[str]",
}
ANSWERS: dict[str, type[Schema]] = {"Settings": Settings, "TaskSettings": TaskSettings}
# The configuration that clients may read, in the contract's order; the rest concerns whoever runs the machine.
PUBLIC_KEYS = (
    "save_path", "attention_mode", "profile", "transformer_quantization", "vae_config", "mmaudio_enabled",
    "default_model", "device", "devices", "context_parallel", "warm_start", "image_format", "allow_download",
    "embed_settings", "max_queue", "max_body_mb", "max_image_pixels",
)  # fmt: skip


def member(kind: str, about: str, presence: str = "required") -> Field:
    """Return a field of one of the table's types."""
    return _of_type(kind, required=presence == "required", metadata={"description": about})


def _of_type(kind: str, **options: Any) -> Field:
    if kind.endswith("?"):
        return _of_type(kind[:-1], allow_none=True, **options)
    if kind.startswith("["):
        return fields.List(_of_type(kind[1:-1]), **options)
    if kind.startswith("{"):
        return fields.Dict(keys=fields.String(), values=_of_type(kind[1:-1]), **options)
    return fields.Nested(ANSWERS[kind], **options) if kind in ANSWERS else TYPES[kind](**options)


_tables = rtoml.load(Path(__file__).with_suffix(".toml"))
ERRORS: Mapping[int, str] = {int(status): about for status, about in _tables.pop("errors").items()}
for _name, _row in _tables.items():
    _base = ANSWERS[_row.pop("base")] if "base" in _row else Open
    ANSWERS[_name] = _base.from_dict({field: member(*about) for field, about in _row.items()}, name=_name)

_keys = {name: member(KEY_TYPES[KEYS[name].type], KEYS[name].metadata["why"]) for name in PUBLIC_KEYS}
_plan = member("str?", "Where the loaded model's weights are, a line a device; null without.")
ANSWERS["ServerConfig"] = Open.from_dict({**_keys, "memory_plan": _plan}, name="ServerConfig")


def __getattr__(name: str) -> type[Schema]:
    """The schema of that name in ANSWERS."""
    if name in ANSWERS:
        return ANSWERS[name]
    raise AttributeError(name)


@cache
def envelope(data: type[Schema]) -> type[Schema]:
    """Return the schema of the answer around `data`, which all but health, files and errors have."""
    return ANSWERS["Envelope"].from_dict({"data": fields.Nested(data, required=True)}, name=f"{data.__name__}Answer")
