"""The catalogue: which models there are and what each can take.

A model is data (`models/*.toml`, and a user's own files in the same form), not code: what differs from one diffusers
class to the next stands in the tables of the files.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import rtoml

from engine.catalog.abilities import INPUTS, STEP_CACHES, TASKS
from engine.settings import SETTINGS

PACKAGE = Path(__file__).parent.parent  # engine/
OWN = PACKAGE / "catalog" / "models"
MAX_SIDE = 4096  # pixels; no model in the catalogue is trained beyond it
MAX_DURATION_S = 600  # of a sound; likewise
SINGLE_FILES = (".safetensors", ".gguf")
SHOWN_MODELS = 10  # ids that an error sentence names before it points to the list

# Which inputs reach a pipeline in another way than by a parameter of their own (see engine/gpu/run/conditioning.py).
FORMS: Mapping[str, frozenset[str]] = {
    "image": frozenset(),
    "video_and_mask": frozenset({"image_start", "image_end", "video_source", "video_guide", "video_mask"}),
    "sound_batch": frozenset(),
    "conditions": frozenset({"image_start", "image_end", "video_source"}),
    "conditions_2": frozenset({"image_start", "image_end", "video_source"}),
    "frame_tensors": frozenset(),
    "rgba": frozenset(),
    "masked_tensors": frozenset({"image_start", "image_end", "video_source", "video_mask"}),
}

# Forms in which any frames can be given, and how many are where nobody says: a latent frame of most VAEs holds four.
MASKED_FORMS = frozenset({"video_and_mask", "masked_tensors"})
MASKED_OVERLAP = 5
MOST_FADED = 17  # frames over which a window that knows only its first frame may fade in

# Tables of which an entry with a base names only what differs; of any other key its own value replaces the base's.
JOINED = frozenset({"defaults", "inputs", "extra_call", "dtypes"})


class UnknownModel(Exception):
    """There is no such model in the catalogue."""


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline class, and what sets its call apart.

    `call` maps a role to the parameter of `__call__` that carries it; `carries` gives an input another role than its
    usual one.
    """

    cls: str
    call: Mapping[str, str]
    carries: Mapping[str, str] = field(default_factory=dict)
    by_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # task → further arguments of the call
    progress: str = "callback_on_step_end"  # or "callback" (the old style), or "none"
    batch: bool = False  # takes several seeds in one call
    start_image_as: str = "image"  # one of FORMS
    guider: bool = False  # guidance lives in `pipe.guider`, not in the call
    null_negative: bool = False  # without a negative prompt the class wants None, which is not the same as ""
    output_type: str = "pt"
    sample_rate: str = ""  # attribute of the pipeline that tells it, such as "vocoder.config.sampling_rate"
    keeps_end: bool = False  # of more frames than were asked for, the last are meant and not the first
    section_frames: int = 0  # the denoising steps are done once for each so many frames
    stages: int = 1  # the steps are given as a list, one number a stage
    only_at_steps: Mapping[str, int] = field(default_factory=dict)  # parameter → steps; at others it is None
    tiled_vae: bool = False  # the VAE works in tiles or not at all
    side_attribute: str = ""  # of the pipeline: the side, in latent pixels, of the area that every picture gets
    resolutions: tuple[str, ...] = ()  # the only sizes that the class makes
    continues_from: int = 0  # it goes on from the last so many frames of the source video
    picture_mark: str = ""  # how a prompt names a reference picture, with {} for its number from 1
    single: bool = False  # what comes out has no batch dimension
    requires: tuple[str, ...] = ()  # packages that the class imports and wangpd does not bring
    cfg_passes: str = "sequential"
    cache_context: bool = False
    loras: bool = False  # diffusers can load LoRA files for it
    tea_cache: bool = False  # the denoiser has Wan's time embedding and plain blocks
    context_parallel: bool = False  # several devices can compute the denoiser's calls together

    def carries_input(self, name: str) -> bool:
        """True if the input `name` has a way into the call."""
        return name in FORMS[self.start_image_as] or self.role(name) in self.call

    def role(self, name: str) -> str:
        """The role of the input `name` in this class."""
        return self.carries.get(name, INPUTS[name].role)


@dataclass(frozen=True)
class Continuation:
    """The task that goes on from a video's last `overlap` frames; up to `most` can be given."""

    task: str
    overlap: int
    most: int


@dataclass(frozen=True)
class FrameRule:
    """Valid lengths are `offset + n * step`, from `min` to `max`.

    With `told_step`, the class is told `told_offset + n * told_step` for them: it counts otherwise than what comes out.
    """

    step: int = 1
    offset: int = 0
    min: int = 1
    max: int = 1000
    told_step: int = 0
    told_offset: int = 0

    def told(self, frames: int) -> int:
        """What the class is told for a valid length."""
        if not self.told_step:
            return frames
        return self.told_offset + (frames - self.offset) // self.step * self.told_step

    def nearest(self, frames: int) -> int:
        """The valid length nearest to `frames`; the longer one of two that are equally near."""
        low, high = (-(-(self.min - self.offset) // self.step), (self.max - self.offset) // self.step)
        n = (2 * (frames - self.offset) + self.step) // (2 * self.step)
        return self.offset + self.step * max(low, min(high, n))

    def shortest_of(self, frames: int) -> int:
        """The shortest valid length of at least `frames`, or the longest there is."""
        n = -(-(max(frames, self.min) - self.offset) // self.step)
        return min(self.offset + self.step * n, self.nearest(self.max))

    def longest_within(self, frames: int) -> int:
        """The longest valid length of at most `frames`, or the shortest there is."""
        n = (min(frames, self.max) - self.offset) // self.step
        return max(self.offset + self.step * n, self.nearest(self.min))


STILL = FrameRule(min=1, max=1)  # of a model that makes pictures or sound


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
    licence: str
    inputs: Mapping[str, Any] = field(default_factory=dict)  # what these weights can use of what the class takes
    frames: FrameRule = STILL
    fps: int = 0
    spatial_multiple: int = 1
    licence_sure: bool = True
    max_side: int = MAX_SIDE
    max_duration_s: int = MAX_DURATION_S
    wangp: str = ""  # WanGP's name for it, which finds it too
    repo: str = ""
    revision: str | None = None
    variant: str | None = None
    extra_repos: Mapping[str, str] = field(default_factory=dict)  # component → repository, or repository#folder
    builtin: str = ""
    base: str = ""
    single_file: str | Mapping[str, str] = ""  # in models_dir: the denoiser or a whole checkpoint, or component → file
    visible: bool = True
    boundary_ratio: float | None = None
    scheduler: Mapping[str, str] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)  # settings of the scheduler unlike those of the weights
    dtypes: Mapping[str, str] = field(default_factory=dict)
    attention_backend: str = ""  # the only one that these weights can be computed with, by diffusers' name
    extra_call: Mapping[str, Any] = field(default_factory=dict)
    recipe_loras: Sequence[Mapping[str, Any]] = ()
    caches: Sequence[str] = ()
    mag_calibration: str = ""
    tea_calibration: str = ""
    window_frames: int = 0  # of one window, where the class itself makes a long video in windows
    transformer_count: int = 1
    transformer_bf16_bytes: int = 0  # of all denoisers together
    encoders_bf16_bytes: int = 0
    vae_bf16_bytes: int = 0

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that this model runs, in catalogue order."""
        return tuple(self.pipelines)

    @property
    def is_t2v(self) -> bool:
        """True if a prompt alone is enough for a video."""
        return "t2v" in self.pipelines

    @property
    def is_i2v(self) -> bool:
        """True if a start picture is animated."""
        return not {"i2v", "flf2v"}.isdisjoint(self.pipelines)

    @property
    def total_bf16_bytes(self) -> int:
        """All weights together."""
        return self.transformer_bf16_bytes + self.encoders_bf16_bytes + self.vae_bf16_bytes

    @property
    def features(self) -> dict[str, bool]:
        """What really works for this model."""
        caches = {name for task in self.pipelines for name in self.step_caches(task)}
        return {
            "sliding_window": self._cuts_by_itself or any(map(self.continuation, self.pipelines)),
            "tea_cache": "tea" in caches,
            "mag_cache": "mag" in caches,
        }

    @property
    def _cuts_by_itself(self) -> bool:
        return bool(self.window_frames) or any(pipeline.section_frames for pipeline in self.pipelines.values())

    @property
    def context_parallel(self) -> bool:
        """Several devices can compute its denoisers' calls together."""
        return all(pipeline.context_parallel for pipeline in self.pipelines.values())

    def continuation(self, task: str) -> Continuation | None:
        """How this model goes on from its own last frames, or None if it can't.

        A class that cuts long videos by itself needs no help, and sound can't be joined at a seam.
        """
        pipeline = self.pipelines[task]
        if self.kind != "video" or self._cuts_by_itself or pipeline.sample_rate:
            return None
        if pipeline.start_image_as in MASKED_FORMS:
            return Continuation(task, MASKED_OVERLAP, most=self.frames.max)
        extending = self.pipelines.get("v2v")
        if extending and extending.continues_from and "video_source" in self.inputs_of("v2v"):
            return Continuation("v2v", extending.continues_from, most=extending.continues_from)
        if task in ("t2v", "i2v", "flf2v") and "i2v" in self.pipelines:
            return Continuation("i2v", 1, most=MOST_FADED)
        return None

    def step_caches(self, task: str) -> tuple[str, ...]:
        """The step caches that give right frames in this task, under the names of a request."""
        pipeline = self.pipelines[task]
        if not (pipeline.cache_context or pipeline.cfg_passes == "single"):
            return ()  # both branches of guidance would share one memory
        ready = {"mag": bool(self.mag_calibration), "tea": bool(self.tea_calibration) and pipeline.tea_cache}
        return tuple(
            name
            for name, kind in STEP_CACHES.items()
            if ready.get(name, True) and (kind in self.caches or name == "tea")
        )

    def inputs_of(self, task: str) -> frozenset[str]:
        """The inputs that reach the pipeline of `task`."""
        pipeline = self.pipelines[task]
        taken = {name for name in TASKS[task].inputs if self._allows(name) and pipeline.carries_input(name)}
        if pipeline.continues_from and "video_source" in taken:
            taken.discard("image_start")  # the source is the start
        return frozenset(taken)

    def _allows(self, name: str) -> bool:
        """False for what the class has and these weights can't use."""
        limits = {"image_end": "end_image", "image_refs": "max_reference_images"}
        return name not in limits or bool(self.inputs.get(limits[name]))

    def takes(self, name: str) -> bool:
        """True if the input `name` (`image_start` …) means something to this model."""
        return any(name in self.inputs_of(task) for task in self.pipelines)

    def has_setting(self, name: str, task: str) -> bool:
        """True if the setting `name` means something to this model, and what it sets reaches the pipeline of `task`."""
        pipeline, setting = self.pipelines[task], SETTINGS[name]
        if self.kind not in setting.kinds or pipeline.call.get(setting.role) in pipeline.by_task.get(task, {}):
            return False
        special = {
            "negative_prompt": "negative_prompt" in pipeline.call and self.inputs.get("negative_prompt", False),
            "embedded_guidance_scale": (
                "embedded_guidance" in pipeline.call and self.inputs.get("embedded_guidance", True)
            ),
            "guidance_scale": ((pipeline.guider or "guidance" in pipeline.call) and self.inputs.get("guidance", True)),
            "guidance2_scale": self.boundary_ratio is not None,
            "flow_shift": "shift_param" in self.scheduler or "shift" in pipeline.call,
            "num_inference_steps": "steps" in pipeline.call and not {"timesteps", "sigmas"} & self.extra_call.keys(),
        }
        return bool(special.get(name, not setting.role or setting.role in pipeline.call))

    @property
    def fixed_steps(self) -> int | None:
        """The number of steps of a schedule that can't be changed, or None."""
        schedule = self.extra_call.get("timesteps") or self.extra_call.get("sigmas")
        return len(schedule) if schedule else None


class Catalog:
    """The models by id, read once at start."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models
        self._aliases = {model.wangp: model.id for model in models.values() if model.wangp}

    @classmethod
    def load(cls, *folders: Path) -> "Catalog":
        """Every model of the `*.toml` files of the package and then of `folders`, where a later entry wins.

        Raises ValueError with the file and what is wrong in it.
        """
        files = [path for folder in (OWN, *folders) for path in sorted(folder.glob("*.toml"))]
        pipelines: dict[str, Pipeline] = {}
        entries: dict[str, Mapping[str, Any]] = {}
        models: dict[str, Model] = {}
        for path in files:
            with _blaming(path):
                document = rtoml.loads(path.read_text("utf-8"))
                pipelines |= {name: _pipeline(name, table) for name, table in document.get("pipelines", {}).items()}
                for entry in document.get("models", ()):
                    entries[entry["id"]] = whole = _with_base(entry, entries)
                    models[entry["id"]] = _model(whole, pipelines)
        return cls(models)

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._models

    def get(self, model_id: str) -> Model:
        """The model with this id, or with this name in WanGP. Raises UnknownModel."""
        try:
            return self._models[model_id if model_id in self._models else self._aliases[model_id]]
        except KeyError:
            raise UnknownModel(f"Model '{model_id}' not found; GET /api/v1/models lists those there are") from None

    def that_take(self, name: str) -> str:
        """The ids of the models that take the input `name`, for a sentence."""
        takers = [model.id for model in self if model.takes(name)]
        more = f" and {len(takers) - SHOWN_MODELS} more" if len(takers) > SHOWN_MODELS else ""
        return (", ".join(takers[:SHOWN_MODELS]) or "none") + more


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path.name}: {reason}") from error


def _with_base(entry: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The entry with what it leaves open taken from its base. One with a repository of its own has its own weights."""
    if not entry.get("base"):
        return entry
    if entry["base"] not in known:
        raise ValueError(f"model '{entry['id']}': base '{entry['base']}' is no model that stands before it")
    base = known[entry["base"]]
    inherited = {key: value for key, value in base.items() if key not in ("wangp", "visible")}
    weights = "" if "repo" in entry else base.get("base") or entry["base"]
    joined = {key: {**base.get(key, {}), **entry[key]} for key in JOINED & entry.keys()}
    return {**inherited, **entry, **joined, "base": weights}


def _pipeline(name: str, table: Mapping[str, Any]) -> Pipeline:
    _require_known(f"pipeline '{name}'", table, Pipeline)
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return Pipeline(cls=name, **values)


def _model(entry: Mapping[str, Any], pipelines: Mapping[str, Pipeline]) -> Model:
    _require_known(f"model '{entry['id']}'", entry, Model)
    chosen = {task: pipelines[cls] for task, cls in entry["pipelines"].items()}
    if unknown := chosen.keys() - TASKS.keys():
        raise ValueError(f"model '{entry['id']}': there is no task '{min(unknown)}'; tasks are {', '.join(TASKS)}")
    frames = FrameRule(**entry["frames"]) if "frames" in entry else STILL
    _require_readable(entry)
    try:
        return Model(**{**entry, "pipelines": chosen, "frames": frames})
    except TypeError as error:
        raise ValueError(f"model '{entry['id']}': {error}") from None


def _require_readable(entry: Mapping[str, Any]) -> None:
    """Raises ValueError for a single file of another kind: a pickled checkpoint could run code."""
    named = entry.get("single_file", "")
    for file in [named] if isinstance(named, str) else named.values():
        if file and not file.endswith(SINGLE_FILES):
            raise ValueError(f"model '{entry['id']}': single_file '{file}' must end in {' or '.join(SINGLE_FILES)}")


def _require_known(where: str, table: Mapping[str, Any], kind: type) -> None:
    known = {entry.name for entry in fields(kind)} - {"cls"}
    if unknown := table.keys() - known:
        raise ValueError(f"{where}: there is no key '{min(unknown)}'")
