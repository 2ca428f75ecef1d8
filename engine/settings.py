"""The request settings of `settings.toml`: schemas, echo, defaults, the pipeline's roles and the docs derive from them.

A new setting that a pipeline has a parameter for is a row there with a role, and that role in the catalogue's `call`.
One that code uses is a row there, and `value(job, name)` where it is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import rtoml

from engine.catalog.abilities import STEP_CACHES, TASKS
from engine.job import Job

EVERY = frozenset({"video", "image", "audio"})
LENGTH = int | str  # frames, or a duration such as "5s"
NO_VALUE = object()  # neutral, of what WanGP does not have


@dataclass(frozen=True)
class Setting:
    """A field of `POST /generate`.

    `low` and `high` limit a number, the characters of a text or the length of a list. `default` holds where neither
    the client nor the model has a value; `unused` is the value that means that a model does not have the setting.
    """

    name: str
    type: Any
    low: float = 0
    high: float = 0
    help: str = ""
    default: Any = None
    unused: Any = None
    role: str = ""  # the pipeline's, in the catalogue's words; only models with that role have the setting
    kinds: frozenset[str] = EVERY  # of the models that can have it
    field: str = ""  # of Job, where it has another name there
    needs: str = ""  # the setting without which this one means nothing and is not echoed
    always: bool = False  # it is in every answer
    guides: bool = False  # it guides how a request is read, and is no setting of the task
    above_low: bool = False  # `low` itself is excluded
    choices: tuple[str, ...] = ()
    pattern: str = ""
    pattern_rule: str = ""  # the pattern in words
    example: str = ""
    wangp: str = ""  # WanGP's name for it, where that is another
    neutral: Any = NO_VALUE  # the value in WanGP's exports that asks for nothing

    @property
    def job_field(self) -> str:
        """The field of Job that has it; "" for one that Job has among its `settings`."""
        field = self.field or self.name
        return field if field in _JOB_FIELDS else ""


def _strengths(job: Job) -> str | None:
    if not job.loras:
        return None
    return " ".join(
        ";".join(",".join(f"{strength:g}" for strength in phase) for phase in lora.phases) for lora in job.loras
    )


# What a Job has in another form than a request.
_SPELLED: Mapping[str, Callable[[Job], Any]] = {
    "resolution": lambda job: f"{job.width}x{job.height}" if job.width else None,
    "activated_loras": lambda job: [lora.path.name for lora in job.loras] or None,
    "loras_multipliers": _strengths,
}
_JOB_FIELDS = frozenset(field.name for field in fields(Job)) - {"settings"}

_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "length": LENGTH, "[str]": tuple[str, ...]}
# What other tables list.
_CHOICES = {"skip_steps_cache_type": ("", *STEP_CACHES), "task": tuple(TASKS)}


def _setting(name: str, row: Mapping[str, Any]) -> Setting:
    kinds, choices = frozenset(row.get("kinds", EVERY)), _CHOICES.get(name, ())
    return Setting(name, **{**row, "type": _TYPES[row["type"]], "kinds": kinds, "choices": choices})


SETTINGS: Mapping[str, Setting] = {
    name: _setting(name, row) for name, row in rtoml.load(Path(__file__).with_suffix(".toml")).items()
}


def value(job: Job, name: str) -> Any:
    """The value of a setting in `job`; its `unused` where the model does not have it, or the job is older than it."""
    if name in _SPELLED:
        return _SPELLED[name](job)
    row = SETTINGS[name]
    return getattr(job, row.job_field) if row.job_field else job.settings.get(name, row.unused)


def defaults(own: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every setting that a request leaves open; `own` are the model's."""
    return {row.name: row.default for row in SETTINGS.values()} | dict(own)


def job_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Job for these values of all settings: its own fields, and `settings` with all others."""
    rows = [row for row in SETTINGS.values() if row.name not in _SPELLED and not row.guides]
    further = {row.name: values[row.name] for row in rows if not row.job_field and values[row.name] != row.unused}
    return {**{row.job_field: values[row.name] for row in rows if row.job_field}, "settings": further}


def echo(job: Job, seed: int | None = None) -> dict[str, Any]:
    """The job under the contract's field names, inputs by their SHA-256; `seed` replaces the job's own."""
    rows = [row for row in SETTINGS.values() if not row.guides and (not row.needs or value(job, row.needs))]
    values = {
        "model_type": job.model,
        "task": job.task,
        "fps": job.fps or None,
        **{row.name: value(job, row.name) for row in rows},
        **({} if seed is None else {"seed": seed}),
        **{name: [path.name for path in paths] for name, paths in job.inputs.items()},
    }
    return {name: held for name, held in values.items() if held is not None}


def roles(job: Job) -> dict[str, Any]:
    """The pipeline's roles that carry a setting as it is."""
    return {row.role: value(job, row.name) for row in SETTINGS.values() if row.role}
