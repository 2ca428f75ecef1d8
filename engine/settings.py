"""The request settings, a row each: schemas, echo, defaults, the pipeline's roles and the documentation derive from it.

A new setting that a pipeline has a parameter for is a row here with a role, and that role in the catalogue's `call`.
One that code uses is a row here, and `value(job, name)` where it is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.catalog.abilities import STEP_CACHES, TASKS
from engine.job import Job

VIDEO = frozenset({"video"})
VISUAL = VIDEO | {"image"}
EVERY = VISUAL | {"audio"}
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

# fmt: off
_ROWS = (
    Setting("prompt", str, 1, 10_000, role="prompt", always=True, neutral="",
            example="a red circle moving right", help="What to show."),
    Setting("negative_prompt", str, 0, 10_000, default="", unused="", role="negative_prompt", neutral="",
            help="What to avoid."),
    Setting("model_type", str, guides=True,
            help="Id of the model; left out, the configured `default_model`."),
    Setting("resolution", str, default="832x480", kinds=VISUAL, neutral="832x480",
            pattern=r"[0-9]{1,5}x[0-9]{1,5}", pattern_rule="WIDTHxHEIGHT in pixels, such as 832x480",
            help="WIDTHxHEIGHT in pixels, each a multiple of the model's size step."),
    Setting("video_length", LENGTH, 1, 1000, default=81, kinds=VIDEO, field="frames", needs="video_length",
            neutral=81,
            help='Frames, or a duration such as "5s"; rounded to what the model can make, with a warning.'),
    Setting("num_inference_steps", int, 1, 100, default=30, role="steps", field="steps", neutral=30,
            help="Denoising steps."),
    Setting("guidance_scale", float, 0, 20, default=5.0, role="guidance", neutral=5, help="Classifier-free guidance."),
    Setting("guidance2_scale", float, 0, 20, role="guidance_2", neutral=5,
            help="Guidance of the second, low-noise expert of a model that has one (Wan 2.2 A14B)."),
    Setting("embedded_guidance_scale", float, 0, 20, default=0.0, unused=0.0, role="embedded_guidance", neutral=6,
            help="Guidance that a distilled model takes as an input."),
    Setting("flow_shift", float, 0, 100, above_low=True, default=5.0, role="shift", neutral=3,
            help="Shift of the noise schedule."),
    Setting("seed", int, -1, 2**63 - 1, default=-1, always=True, neutral=-1,
            help="-1 draws one, which the answer reports. File i has seed + i."),
    Setting("batch_size", int, 1, 10, default=1, always=True, neutral=1, help="Files a run."),
    Setting("repeat_generation", int, 1, 10, default=1, always=True, neutral=1, help="Runs."),
    Setting("use_model_defaults", bool, default=True, guides=True,
            help="true: what is left out takes the model's default; false: the default given here."),
    Setting("denoising_strength", float, 0, 1, default=0.8, role="strength", neutral=1,
            help="How much a source picture or video is changed: 0 hardly, 1 wholly."),
    Setting("duration_seconds", float, 1, 600, default=10.0, role="duration", field="duration_s", neutral=0,
            help="Length of a sound."),
    Setting("lyrics", str, 0, 10_000, default="", unused="", role="lyrics", needs="lyrics", help="What is sung."),
    Setting("activated_loras", tuple[str, ...], 0, 20, neutral=(),
            help="LoRA files, by the names that `GET /loras` lists."),
    Setting("loras_multipliers", str, 0, 2000, default="", needs="activated_loras", neutral="",
            help="Strength of each LoRA, separated by spaces; 0,0.5,1 spreads values over the steps, 1;0 over two "
                 "experts."),
    Setting("skip_steps_cache_type", str, default="", choices=("", *STEP_CACHES), needs="skip_steps_cache_type",
            neutral="",
            help="Step cache: mag, tea, fbc or taylorseer, as far as the model can; empty: every step is computed."),
    Setting("skip_steps_multiplier", float, 1, 4, default=1.75, needs="skip_steps_cache_type", neutral=1.75,
            help="How many times faster the denoising should be."),
    Setting("skip_steps_start_step_perc", float, 0, 100, default=0.0, needs="skip_steps_cache_type", neutral=0,
            help="Percent of the steps, from the first, that are always computed."),
    Setting("sliding_window_size", int, 0, 1000, kinds=VIDEO, field="window_frames", needs="sliding_window_size",
            neutral=129,
            help="Frames that are made at once; a longer video is made window by window, as far as the model can "
                 "continue from its own frames. 0: the whole video at once. Left out, the model's usual length."),
    Setting("sliding_window_overlap", int, 1, 97, kinds=VIDEO, field="window_overlap", needs="sliding_window_size",
            neutral=5,
            help="Frames that a window shares with the one before. Left out, what suits the model."),
    Setting("sliding_window_color_correction_strength", float, 0, 1, default=1.0, kinds=VIDEO,
            field="color_correction", needs="sliding_window_size", neutral=0,
            help="How far each window takes over the colours of the one before: 0 not, 1 wholly."),
    Setting("task", str, choices=tuple(TASKS), guides=True,
            help="What the model should do, where the inputs leave more than one choice."),
)
# fmt: on
SETTINGS: Mapping[str, Setting] = {row.name: row for row in _ROWS}


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
