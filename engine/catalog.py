"""The catalogue: which models there are, what each can take, and how a request becomes a Job.

A model is data (`models/*.toml`), not code. `resolve` decides everything that a client left open, so that a Job needs
no default and no chance later; whatever the model can't do is refused here, before anything is queued.
"""

import re
import secrets
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.job import Job

HERE = Path(__file__).parent
IMAGE_INPUTS = ("image_start", "image_end", "image_refs")
MAX_SIDE = 4096  # pixels; no model in the catalogue is trained beyond it
MAX_FRAMES = 1000  # the contract's limit of video_length
SEED_RANGE = 2**63  # torch takes more, JSON clients don't

# What a field means when neither the client nor the model says anything: the contract's own defaults.
CONTRACT_DEFAULTS: Mapping[str, Any] = {
    "negative_prompt": "",
    "resolution": "832x480",
    "video_length": 81,
    "num_inference_steps": 30,
    "guidance_scale": 5.0,
    "embedded_guidance_scale": 0.0,
    "flow_shift": 5.0,
    "seed": -1,
    "batch_size": 1,
    "repeat_generation": 1,
}

# Which task a set of given pictures asks for, best first.
TASKS_FOR: Mapping[frozenset[str], tuple[str, ...]] = {
    frozenset(): ("t2v", "vace"),
    frozenset({"image_start"}): ("i2v", "vace"),
    frozenset({"image_end"}): ("vace",),
    frozenset({"image_start", "image_end"}): ("flf2v", "i2v", "vace"),
    frozenset({"image_refs"}): ("vace",),
    frozenset({"image_start", "image_refs"}): ("vace",),
    frozenset({"image_end", "image_refs"}): ("vace",),
    frozenset({"image_start", "image_end", "image_refs"}): ("vace",),
}

# What the engine can do beyond plain generation. A model's entry says what its architecture would allow.
WORKING_FEATURES: frozenset[str] = frozenset()

# Settings that only some models have: the pipeline role that carries each, and the value that means "not used".
OPTIONAL_SETTINGS: Mapping[str, tuple[str, Any]] = {
    "negative_prompt": ("negative_prompt", ""),
    "embedded_guidance_scale": ("embedded_guidance", 0.0),
    "flow_shift": ("shift", None),
    "guidance2_scale": ("guidance_2", None),
}


class BadRequest(Exception):
    """The request can't be run as it is: one sentence that names the field, the value, the rule and the remedy."""


class UnknownModel(Exception):
    """There is no such model in the catalogue."""


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline class, and which of its `__call__` parameters carries which role."""

    cls: str
    call: Mapping[str, str]
    progress: str = "callback_on_step_end"
    batch: bool = True  # takes several seeds in one call
    start_image_as: str = "image"  # or "video_and_mask": known frames are given inside a masked control video


@dataclass(frozen=True)
class FrameRule:
    """Valid lengths are `offset + n * step`, from `min` to `max`."""

    step: int = 1
    offset: int = 0
    min: int = 1
    max: int = 1000

    def nearest(self, frames: int) -> int:
        """The valid length nearest to `frames`; the longer one of two that are equally near."""
        low, high = (-(-(self.min - self.offset) // self.step), (self.max - self.offset) // self.step)
        n = (2 * (frames - self.offset) + self.step) // (2 * self.step)
        return self.offset + self.step * max(low, min(high, n))


@dataclass(frozen=True)
class Model:
    """One model of the catalogue. `pipelines` maps a task to its class; `repo` is empty for the embedded model."""

    id: str
    name: str
    description: str
    family: str
    kind: str  # video, image, audio
    pipelines: Mapping[str, Pipeline]
    defaults: Mapping[str, Any]
    inputs: Mapping[str, Any]
    frames: FrameRule
    fps: int
    spatial_multiple: int
    licence: str
    max_side: int = MAX_SIDE
    repo: str = ""
    revision: str | None = None
    variant: str | None = None
    builtin: str = ""
    base: str = ""
    visible: bool = True
    boundary_ratio: float | None = None
    scheduler: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    extra_call: Mapping[str, Any] = field(default_factory=dict)
    recipe_loras: Sequence[Mapping[str, Any]] = ()
    supported_features: Mapping[str, bool] = field(default_factory=dict)
    transformer_count: int = 1
    transformer_bf16_bytes: int = 0  # of all denoisers together
    encoders_bf16_bytes: int = 0
    vae_bf16_bytes: int = 0
    total_bf16_bytes: int = 0

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that this model runs, in catalogue order."""
        return tuple(self.pipelines)

    @property
    def is_t2v(self) -> bool:
        """True if a prompt alone is enough."""
        return "t2v" in self.pipelines

    @property
    def is_i2v(self) -> bool:
        """True if a start picture is animated."""
        return not {"i2v", "flf2v"}.isdisjoint(self.pipelines)

    @property
    def features(self) -> dict[str, bool]:
        """What really works for this model: its own architecture and this engine both have it."""
        return {name: there and name in WORKING_FEATURES for name, there in self.supported_features.items()}

    def takes(self, name: str) -> bool:
        """True if the input picture `name` (`image_start` …) means something to this model."""
        if name == "image_refs":
            return bool(self.inputs.get("max_reference_images", 0))
        return bool(self.inputs.get({"image_start": "start_image", "image_end": "end_image"}[name], False))

    def has_setting(self, name: str, task: str) -> bool:
        """True if the optional setting `name` (see OPTIONAL_SETTINGS) reaches the pipeline of `task`."""
        if name == "flow_shift":
            return "shift_param" in self.scheduler or "shift" in self.pipelines[task].call
        if name == "guidance2_scale":
            return self.boundary_ratio is not None
        if name == "negative_prompt":
            return bool(self.inputs.get("negative_prompt", True))
        return OPTIONAL_SETTINGS[name][0] in self.pipelines[task].call


class Catalog:
    """The models by id, read once at start."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models

    @classmethod
    def load(cls, folder: Path = HERE / "models") -> "Catalog":
        """Every model of the `*.toml` files in `folder`. Raises ValueError with file and id of a wrong entry."""
        models = (model for path in sorted(folder.glob("*.toml")) for model in _read(path))
        return cls({model.id: model for model in models})

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._models

    def get(self, model_id: str) -> Model:
        """The model with this id. Raises UnknownModel."""
        try:
            return self._models[model_id]
        except KeyError:
            raise UnknownModel(f"Model '{model_id}' not found; GET /api/v1/models lists those there are") from None

    def that_take(self, name: str) -> list[str]:
        """The ids of the models that take the input picture `name`."""
        return [model.id for model in self if model.takes(name)]


def _read(path: Path) -> Iterator[Model]:
    document = tomllib.loads(path.read_text("utf-8"))
    pipelines = {name: _pipeline(name, table) for name, table in document["pipelines"].items()}
    for entry in document["models"]:
        try:
            yield _model(entry, pipelines)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path.name}: model {entry.get('id')!r}: {error}") from error


def _pipeline(name: str, table: Mapping[str, Any]) -> Pipeline:
    known = {key: table[key] for key in ("call", "progress", "batch", "start_image_as") if key in table}
    return Pipeline(cls=name, **known)


def _model(entry: Mapping[str, Any], pipelines: Mapping[str, Pipeline]) -> Model:
    plain = {key: value for key, value in entry.items() if key in _FIELDS}
    plain["pipelines"] = {task: pipelines[cls] for task, cls in entry["pipelines"].items()}
    plain["frames"] = FrameRule(**entry.get("frames", {}))
    return Model(**plain)


# An entry may say more than a Model holds: notes for people, and figures for strategies that read the file themselves.
_FIELDS = frozenset(entry.name for entry in fields(Model))


@dataclass(frozen=True)
class Resolved:
    """A Job, and what was changed or ignored on the way to it, a sentence each."""

    job: Job
    warnings: tuple[str, ...]


def resolve(
    catalog: Catalog, model: Model, sent: Mapping[str, Any], images: Mapping[str, tuple[Path, ...]]
) -> Resolved:
    """Decide everything that `sent` leaves open. `images` are the stored input pictures by field name.

    A field in `sent` always wins; else the model's default holds, or with `use_model_defaults` false the contract's.
    Raises BadRequest for what the model can't do.
    """
    _check_images(catalog, model, images)
    task = _choose_task(model, frozenset(images))
    warnings: list[str] = []
    values = _values(model, task, sent, warnings)
    width, height = _size(model, values["resolution"])
    job = Job(
        model=model.id,
        task=task,
        prompt=sent["prompt"],
        negative_prompt=values["negative_prompt"],
        width=width,
        height=height,
        frames=_frames(model, values["video_length"], warnings),
        fps=model.fps,
        steps=values["num_inference_steps"],
        guidance_scale=values["guidance_scale"],
        guidance2_scale=values["guidance2_scale"],
        embedded_guidance_scale=values["embedded_guidance_scale"],
        flow_shift=values["flow_shift"],
        seed=secrets.randbelow(2**32) if values["seed"] == -1 else values["seed"],
        batch_size=values["batch_size"],
        repeat_generation=values["repeat_generation"],
        images=images,
    )
    return Resolved(job, tuple(warnings))


def _check_images(catalog: Catalog, model: Model, images: Mapping[str, tuple[Path, ...]]) -> None:
    for name, paths in images.items():
        if not model.takes(name):
            others = ", ".join(catalog.that_take(name)) or "none"
            raise BadRequest(f"{name}: model '{model.id}' takes no such image; models that do: {others}")
        most = model.inputs.get("max_reference_images", 0)
        if name == "image_refs" and len(paths) > most:
            raise BadRequest(f"image_refs: {len(paths)} images, but model '{model.id}' takes at most {most}")


def _choose_task(model: Model, given: frozenset[str]) -> str:
    for task in TASKS_FOR[given]:
        if task in model.pipelines:
            return task
    missing = next(name for name in IMAGE_INPUTS if model.takes(name) and name not in given)
    raise BadRequest(f"{missing}: model '{model.id}' needs this image, and none was sent")


def _values(model: Model, task: str, sent: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    """The value of every setting; one that the model does not have is named in `warnings` if it was sent."""
    defaults = {**CONTRACT_DEFAULTS, "guidance2_scale": None}
    if sent.get("use_model_defaults", True):
        defaults |= model.defaults
    values = defaults | {key: sent[key] for key in defaults if key in sent}
    if values["guidance2_scale"] is None:
        values["guidance2_scale"] = values["guidance_scale"]
    for name, (_, unused) in OPTIONAL_SETTINGS.items():
        if not model.has_setting(name, task):
            if sent.get(name, unused) != unused:
                warnings.append(f"{name}: model '{model.id}' has no such setting, the value was ignored")
            values[name] = unused
    return values


def _size(model: Model, resolution: str) -> tuple[int, int]:
    matched = re.fullmatch(r"(\d{1,5})x(\d{1,5})", resolution)
    if not matched:
        raise BadRequest(f"resolution: '{resolution}' must be WIDTHxHEIGHT in pixels, such as 832x480")
    width, height = int(matched[1]), int(matched[2])
    step = model.spatial_multiple
    best = "x".join(str(_nearest_side(side, step, model.max_side)) for side in (width, height))
    if best == f"{width}x{height}":
        return width, height
    if max(width, height) > model.max_side:
        raise BadRequest(f"resolution: '{resolution}' is over the limit of {model.max_side} pixels a side")
    raise BadRequest(f"resolution: '{resolution}' must be a multiple of {step}; nearest is {best}")


def _nearest_side(side: int, step: int, most: int) -> int:
    return min(max(round(side / step), 1) * step, most // step * step)


def _frames(model: Model, video_length: int | str, warnings: list[str]) -> int:
    """The length in frames; a duration such as "5s" counts at the model's frame rate, to the nearest length."""
    duration = isinstance(video_length, str)
    wanted = round(float(str(video_length)[:-1]) * model.fps) if duration else int(video_length)
    if not 1 <= wanted <= MAX_FRAMES:
        rule = f"makes {wanted} frames at {model.fps} a second, but must make 1 to {MAX_FRAMES}"
        raise BadRequest(f"video_length: '{video_length}' {rule}")
    frames = model.frames.nearest(wanted)
    if abs(frames - wanted) >= (model.frames.step if duration else 1):
        rule = f"{model.frames.step}k+{model.frames.offset}"
        warnings.append(
            f"video_length: {wanted} was changed to {frames}, the nearest that model '{model.id}' can make ({rule})"
        )
    return frames


def settings(job: Job, seed: int | None = None) -> dict[str, Any]:
    """The job under the contract's own field names, as status answers and files carry it.

    What the model does not have is left out; pictures are told by the SHA-256 of their bytes.
    """
    values = {
        "model_type": job.model,
        "task": job.task,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "resolution": f"{job.width}x{job.height}",
        "video_length": job.frames,
        "fps": job.fps,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance_scale,
        "guidance2_scale": job.guidance2_scale,
        "embedded_guidance_scale": job.embedded_guidance_scale,
        "flow_shift": job.flow_shift,
        "seed": job.seed if seed is None else seed,
        "batch_size": job.batch_size,
        "repeat_generation": job.repeat_generation,
        **{name: [path.name for path in paths] for name, paths in job.images.items()},
    }
    return {name: value for name, value in values.items() if value is not None}


def default_settings(model: Model) -> dict[str, Any]:
    """What a request that names only a prompt gets, under the contract's field names."""
    values = {**CONTRACT_DEFAULTS, **model.defaults}
    task = model.tasks[0]
    hidden = {name for name in OPTIONAL_SETTINGS if not model.has_setting(name, task)}
    return {"prompt": "", **{key: value for key, value in values.items() if key not in hidden}}
