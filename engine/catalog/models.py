"""The catalogue: the models and what each accepts, as `models/*.toml` and a user's own files say."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import rtoml

from engine.catalog.abilities import FORMS, INPUTS, STEP_CACHES, TASKS
from engine.settings import SETTINGS, defaults

Table: TypeAlias = Mapping[str, Any]
Made = TypeVar("Made", "Pipeline", "FrameRule", "Model")
PACKAGE = Path(__file__).parent.parent  # engine/
USUAL_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
MAX_SIDE = 4096  # pixels; no model in the catalogue is trained beyond it
MAX_DURATION_S = 600  # of sound; the same holds
SHOWN_MODELS = 10  # the most ids that an error sentence lists
MASKED_FORMS = frozenset({"video_and_mask", "masked_tensors"})  # in which any number of frames can be given
MASKED_OVERLAP = 5  # frames, for these forms: a latent frame of most VAEs holds four
MOST_FADED = 17  # frames over which a window that is given only its first frame may fade in
_ROLES: Mapping[str, Mapping[str, str]] = rtoml.load(Path(__file__).with_name("roles.toml"))
# Tables of which an entry names only what differs from its base or family; any other value replaces theirs.
JOINED = frozenset({"defaults", "inputs", "extra_call", "dtypes"})


class UnknownModel(Exception):
    """There is no such model in the catalogue."""


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline class and how it is called."""

    cls: str
    call: Mapping[str, str]  # role → the parameter of `__call__` that carries it
    carries: Mapping[str, str] = field(default_factory=dict)  # input → its role, where that is not the usual one
    by_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # task → further arguments of the call
    progress: str = "callback_on_step_end"  # or "callback" (the old style), or "none"
    batch: bool = False  # takes several seeds in one call
    start_image_as: str = "image"  # one of FORMS
    guider: bool = False  # guidance is set in `pipe.guider`, not in the call
    null_negative: bool = False  # without a negative prompt the class needs None, which is not the same as ""
    output_type: str = "pt"
    sample_rate: str = ""  # the attribute of the pipeline that holds it, such as "vocoder.config.sampling_rate"
    keeps_end: bool = False  # of more frames than requested, the last are kept and not the first
    section_frames: int = 0  # all denoising steps are run once for every section of so many frames
    stages: int = 1  # the steps are given as a list, one number a stage
    only_at_steps: Mapping[str, int] = field(default_factory=dict)  # parameter → steps; at others it is None
    tiled_vae: bool = False  # the VAE works in tiles or not at all
    side_attribute: str = ""  # the pipeline's attribute for the side, in latent pixels, of the area of every picture
    resolutions: tuple[str, ...] = ()  # the only sizes that the class makes
    continues_from: int = 0  # the class continues the source video from its last so many frames
    picture_mark: str = ""  # how a prompt refers to a reference picture, with {} for its number from 1
    single: bool = False  # the output has no batch dimension
    requires: tuple[str, ...] = ()  # packages that the class imports and wangpd does not depend on
    cfg_passes: str = "sequential"
    cache_context: bool = False
    loras: bool = False  # diffusers can load LoRA files for it
    tea_cache: bool = False  # the denoiser has Wan's time embedding and plain blocks
    context_parallel: bool = False  # several devices can compute a denoiser call together

    def carries_input(self, name: str) -> bool:
        """True if the call can pass on the input `name`."""
        return name in FORMS[self.start_image_as] or self.role(name) in self.call

    def role(self, name: str) -> str:
        """The role of the input `name` in this class."""
        return self.carries.get(name, INPUTS[name].role)


class Continuation(NamedTuple):
    """The task that continues a video from its last `overlap` frames; it accepts up to `most`."""

    task: str
    overlap: int
    most: int


@dataclass(frozen=True)
class FrameRule:
    """Valid lengths are `offset + n * step`, from `min` to `max`."""

    step: int = 1
    offset: int = 0
    min: int = 1
    max: int = 1000
    told_step: int = 0  # if not 0, the class's own parameter for such a length is `told_offset + n * told_step`
    told_offset: int = 0

    def told(self, frames: int) -> int:
        """The value of the class's parameter for a valid length."""
        sections = (frames - self.offset) // self.step
        return self.told_offset + sections * self.told_step if self.told_step else frames

    def nearest(self, frames: int) -> int:
        """The valid length nearest to `frames`; the longer one of two that are equally near."""
        return self.longest_within(frames + self.step // 2)

    def shortest_of(self, frames: int) -> int:
        """The shortest valid length of at least `frames`, or the longest there is."""
        return self.longest_within(frames + self.step - 1)

    def longest_within(self, frames: int) -> int:
        """The longest valid length of at most `frames`, or the shortest there is."""
        low, high = -(-(self.min - self.offset) // self.step), (self.max - self.offset) // self.step
        return self.offset + self.step * max(low, min(high, (frames - self.offset) // self.step))


@dataclass(frozen=True)
class Model:
    """A model of the catalogue. `pipelines` maps a task to its class; `repo` is empty for the embedded model."""

    id: str
    name: str
    description: str
    family: str
    pipelines: Mapping[str, Pipeline]
    defaults: Mapping[str, Any]
    kind: str = "video"  # or image, audio
    licence: str = "see card"
    inputs: Mapping[str, Any] = field(default_factory=dict)  # what these weights support of what the class accepts
    frames: FrameRule = FrameRule(max=1)  # where it makes pictures or sound
    fps: int = 0
    spatial_multiple: int = 1
    max_side: int = MAX_SIDE
    max_duration_s: int = MAX_DURATION_S
    wangp: str = ""  # WanGP's id for it, which a request can use too
    repo: str = ""
    revision: str | None = None
    variant: str | None = None
    extra_repos: Mapping[str, str] = field(default_factory=dict)  # component → repository, or repository#folder
    builtin: str = ""
    base: str = ""
    single_file: str | Mapping[str, str] = ""  # in models_dir: the denoiser or a whole checkpoint, or component → file
    visible: bool = True
    boundary_ratio: float | None = None
    scheduler: Mapping[str, str] = field(default_factory=lambda: {"cls": USUAL_SCHEDULER})
    schedule: Mapping[str, Any] = field(default_factory=dict)  # scheduler settings that replace those of the weights
    dtypes: Mapping[str, str] = field(default_factory=dict)
    attention_backend: str = ""  # the only one that works with these weights, by diffusers' name
    extra_call: Mapping[str, Any] = field(default_factory=dict)
    recipe_loras: Sequence[Mapping[str, Any]] = ()
    caches: Sequence[str] = ()
    mag_calibration: str = ""
    tea_calibration: str = ""
    window_frames: int = 0  # length of a window, where the class itself makes a long video in windows
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
        """True if it animates a start picture."""
        return not {"i2v", "flf2v"}.isdisjoint(self.pipelines)

    @property
    def total_bf16_bytes(self) -> int:
        """Size of all weights together."""
        return self.transformer_bf16_bytes + self.encoders_bf16_bytes + self.vae_bf16_bytes

    @property
    def features(self) -> dict[str, bool]:
        """The contract's feature flags: what works with this model."""
        caches = {name for task in self.pipelines for name in self.step_caches(task)}
        sliding_window = self._cuts_by_itself or any(map(self.continuation, self.pipelines))
        return {"sliding_window": sliding_window, "tea_cache": "tea" in caches, "mag_cache": "mag" in caches}

    @property
    def _cuts_by_itself(self) -> bool:
        return bool(self.window_frames) or any(pipeline.section_frames for pipeline in self.pipelines.values())

    @property
    def context_parallel(self) -> bool:
        """True if several devices can compute its denoiser calls together."""
        return all(pipeline.context_parallel for pipeline in self.pipelines.values())

    def continuation(self, task: str) -> Continuation | None:
        """How this model continues from its own last frames, or None if it can't or does so by itself."""
        pipeline = self.pipelines[task]
        if self.kind != "video" or self._cuts_by_itself or pipeline.sample_rate:  # sound can't be joined at a seam
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
        """The step caches that give correct frames in this task, by their names in a request."""
        pipeline = self.pipelines[task]
        if not (pipeline.cache_context or pipeline.cfg_passes == "single"):
            return ()  # both branches of guidance would share one cache
        ready = {name: kind in self.caches for name, kind in STEP_CACHES.items()}
        ready["mag"] &= bool(self.mag_calibration)
        ready["tea"] = bool(self.tea_calibration) and pipeline.tea_cache
        return tuple(filter(ready.get, ready))

    def inputs_of(self, task: str) -> frozenset[str]:
        """The inputs that reach the pipeline of `task`."""
        pipeline = self.pipelines[task]
        limits = {"image_end": "end_image", "image_refs": "max_reference_images"}
        allowed = {name for name in TASKS[task].inputs if name not in limits or self.inputs.get(limits[name])}
        taken = frozenset(filter(pipeline.carries_input, allowed))
        # The source video of a class that continues it is the start.
        return taken - {"image_start"} if pipeline.continues_from and "video_source" in taken else taken

    def takes(self, name: str) -> bool:
        """True if a task of this model accepts the input `name` (`image_start` …)."""
        return any(name in self.inputs_of(task) for task in self.pipelines)

    def has_setting(self, name: str, task: str) -> bool:
        """True if the setting `name` means something to this model, and what it sets reaches the pipeline of `task`."""
        pipeline, setting = self.pipelines[task], SETTINGS[name]
        if self.kind not in setting.kinds or pipeline.call.get(setting.role) in pipeline.by_task.get(task, {}):
            return False
        carried = not setting.role or setting.role in pipeline.call
        special = {
            "negative_prompt": carried and self.inputs.get("negative_prompt", False),
            "embedded_guidance_scale": carried and self.inputs.get("embedded_guidance", True),
            "guidance_scale": (carried or pipeline.guider) and self.inputs.get("guidance", True),
            "guidance2_scale": self.boundary_ratio is not None,
            "flow_shift": carried or "shift_param" in self.scheduler,
            "num_inference_steps": carried and not {"timesteps", "sigmas"} & self.extra_call.keys(),
        }
        return bool(special.get(name, carried))

    @property
    def files(self) -> Mapping[str, str]:
        """Component → the single file of its weights; "" stands for the denoiser or a whole checkpoint."""
        files = {"": self.single_file} if isinstance(self.single_file, str) else self.single_file
        return {name: file for name, file in files.items() if file}

    @property
    def fixed_steps(self) -> int | None:
        """The number of steps of a schedule that can't be changed, or None."""
        return len(self.extra_call.get("timesteps") or self.extra_call.get("sigmas") or ()) or None


def default_settings(model: Model) -> dict[str, Any]:
    """What a request gets that names only a prompt; without windows, of which a video of the usual length has one."""
    values = {**defaults(model.defaults), "prompt": ""}
    return {"prompt": ""} | {
        row.name: values[row.name]
        for row in SETTINGS.values()
        if not row.guides
        and model.has_setting(row.name, model.tasks[0])
        and row.needs != "sliding_window_size"
        and (row.role or not row.needs or values[row.needs])
        and values[row.name] is not None
    }


class Catalog:
    """The models by id, read once at the start."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models
        self._by_alias = {model.wangp: model for model in models.values() if model.wangp}

    @classmethod
    def load(cls, *folders: Path) -> "Catalog":
        """The models of the package's and the folders' TOML files; of two with one id, the later. Raises ValueError."""
        pipelines: dict[str, Pipeline] = {}
        known: dict[str, Table] = {}
        models: dict[str, Model] = {}
        own = PACKAGE / "catalog" / "models"
        for path in (path for folder in (own, *folders) for path in sorted(folder.glob("*.toml"))):
            try:
                classes, completed = read(path, known)
                pipelines |= {name: _made(Pipeline, f"pipeline '{name}'", classes[name], cls=name) for name in classes}
                models |= {entry["id"]: _model(entry, pipelines) for entry in completed}
            except (ValueError, TypeError, KeyError) as error:
                reason = f"no key {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{path.name}: {reason}") from error
        return cls(models)

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._models

    def get(self, model_id: str) -> Model:
        """The model with this id, or with this id in WanGP. Raises UnknownModel."""
        if model := self._models.get(model_id) or self._by_alias.get(model_id):
            return model
        raise UnknownModel(f"Model '{model_id}' not found; GET /api/v1/models lists those there are")

    def that_take(self, name: str) -> str:
        """The ids of the models that accept the input `name`, for an error sentence."""
        takers = [model.id for model in self if model.takes(name)]
        more = f" and {len(takers) - SHOWN_MODELS} more" if len(takers) > SHOWN_MODELS else ""
        return (", ".join(takers[:SHOWN_MODELS]) or "none") + more


def read(path: Path, known: dict[str, Table]) -> tuple[dict[str, Table], list[Table]]:
    """The complete tables of a file's pipelines, by class, and of its models, which join `known`. Raises ValueError."""
    document = rtoml.load(path)
    if unknown := document.keys() - {"pipelines", "family", "models"}:
        raise ValueError(f"there is no table '{min(unknown)}'; tables are pipelines, family, models")
    pipelines = document.get("pipelines", {})
    shared = {key: value for key, value in pipelines.items() if not isinstance(value, dict)}
    classes: dict[str, Table] = {
        name: {**shared, **table, "call": _call(name, table["call"])}
        for name, table in pipelines.items()
        if name not in shared
    }
    family = {"family": path.stem, **document.get("family", {})}
    models = []
    for entry in document.get("models", ()):
        models.append(_completed(entry, known, family))
        known[entry["id"]] = models[-1]
    return classes, models


def _completed(entry: Table, known: Mapping[str, Table], family: Table) -> Table:
    """The entry completed from its base or, without one, from its file's family."""
    inherited, base = family, {}
    if name := entry.get("base"):
        if name not in known:
            raise ValueError(f"model '{entry['id']}': base '{name}' is no model that stands before it")
        inherited = {key: value for key, value in known[name].items() if key not in ("wangp", "visible")}
        # A repository of its own has weights of its own.
        base = {"base": "" if "repo" in entry else inherited.get("base") or name}
    joined = {key: {**inherited.get(key, {}), **entry[key]} for key in JOINED & entry.keys()}
    return {**inherited, **entry, **joined, **base}


def _call(name: str, table: Table) -> dict[str, str]:
    """Role → parameter: the usual ones of the kind that `usual` names, changed by the other values of `table`."""
    kind = table.get("usual")
    if kind not in (None, "video", "image", "audio"):
        raise ValueError(f"pipeline '{name}': call.usual must be video, image or audio, not '{kind}'")
    call = {**_ROLES["every"], **_ROLES[kind]} if kind else {}
    parameters = {role: parameter for group in _ROLES.values() for role, parameter in group.items()}
    for role in table.keys() - {"usual"}:
        if isinstance(table[role], bool) and role not in parameters:
            raise ValueError(f"pipeline '{name}': call.{role} needs the name of a parameter: the role has no usual one")
        call[role] = parameters[role] if table[role] is True else table[role]
    return {role: parameter for role, parameter in call.items() if parameter}


def _model(entry: Table, pipelines: Mapping[str, Pipeline]) -> Model:
    where = f"model '{entry['id']}'"
    chosen = {task: pipelines[cls] for task, cls in entry["pipelines"].items()}
    if unknown := chosen.keys() - TASKS.keys():
        raise ValueError(f"{where}: there is no task '{min(unknown)}'; tasks are {', '.join(TASKS)}")
    frames = _made(FrameRule, f"{where}: frames", entry.get("frames", {"max": 1}))
    model = _made(Model, where, entry, pipelines=chosen, frames=frames)
    for file in model.files.values():
        if not file.endswith((".safetensors", ".gguf")):  # a pickled checkpoint could run code
            raise ValueError(f"{where}: single_file '{file}' must end in .safetensors or .gguf")
    return model


def _made(kind: type[Made], where: str, table: Table, **further: Any) -> Made:
    """An object with the values of the table and `further`. Raises ValueError for an unknown key or a missing one."""
    known = {entry.name for entry in fields(kind)} - {"cls"}
    if unknown := table.keys() - known:
        raise ValueError(f"{where}: there is no key '{min(unknown)}'")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    try:
        return kind(**{**values, **further})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None
