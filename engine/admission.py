"""How a request becomes a Job: everything that it leaves open is decided here, and what can't be done is refused.

A Job then needs no default and no chance, and nothing is queued that the model could not run.
"""

import dataclasses
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine import capabilities
from engine.catalog import loras, weights
from engine.catalog.abilities import INPUTS, TASKS
from engine.catalog.models import OPTIONAL_SETTINGS, Catalog, FrameRule, Model
from engine.catalog.weights import Weights
from engine.files import footage, media
from engine.job import EngineError, Job, Lora
from engine.planning import windows

MAX_FRAMES = 1000  # the contract's limit of video_length

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
# Likewise for what the contract does not know.
FURTHER_DEFAULTS: Mapping[str, Any] = {
    "guidance2_scale": None,
    "denoising_strength": 0.8,
    "duration_seconds": 10.0,
    "lyrics": "",
    "skip_steps_cache_type": "",
    "skip_steps_multiplier": 1.75,
    "skip_steps_start_step_perc": 0.0,
    "sliding_window_size": None,  # as long as the model's usual video
    "sliding_window_overlap": None,
    "sliding_window_color_correction_strength": 1.0,
}
CACHE_SETTINGS = ("skip_steps_cache_type", "skip_steps_multiplier", "skip_steps_start_step_perc")
MOST_MAG_STEPS = 50  # the calibrations are of that many at most


class BadRequest(Exception):
    """The request can't be run as it is: one sentence that names the field, the value, the rule and the remedy."""


@dataclass(frozen=True)
class Media:
    """A checked input: the files of one field, and the length of a video or a sound."""

    paths: tuple[Path, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Resolved:
    """A Job, and what was changed or ignored on the way to it, a sentence each."""

    job: Job
    warnings: tuple[str, ...]


def resolve(catalog: Catalog, model: Model, sent: Mapping[str, Any], given: Mapping[str, Media]) -> Resolved:
    """Decide everything that `sent` leaves open. `given` are the stored inputs by field name.

    A field in `sent` always wins; else the model's default holds, or with `use_model_defaults` false the contract's.
    Raises BadRequest for what the model can't do.
    """
    _check_inputs(catalog, model, given)
    task = _choose_task(model, frozenset(given), sent.get("task"))
    _require_packages(model, task)
    warnings: list[str] = []
    values = _values(model, task, sent, warnings)
    _check_duration(model, values["duration_seconds"])
    width, height = _size(model, task, values["resolution"])
    window, overlap = windows.chosen(model, task, values, warnings)
    rule = replace(model.frames, max=MAX_FRAMES) if window else model.frames
    source = _source_frames(model, task, given)
    frames = _frames(model, rule, values["video_length"], source=source, sent=sent, warnings=warnings)
    is_long = 0 < window < frames
    job = Job(
        model=model.id,
        task=task,
        prompt=sent["prompt"],
        negative_prompt=values["negative_prompt"],
        width=width,
        height=height,
        frames=frames,
        window_frames=window if is_long else 0,
        window_overlap=overlap if is_long else 0,
        color_correction=values["sliding_window_color_correction_strength"] if is_long else 0.0,
        fps=model.fps,
        steps=values["num_inference_steps"],
        guidance_scale=values["guidance_scale"],
        guidance2_scale=values["guidance2_scale"],
        embedded_guidance_scale=values["embedded_guidance_scale"],
        flow_shift=values["flow_shift"],
        denoising_strength=values["denoising_strength"],
        duration_s=values["duration_seconds"],
        lyrics=values["lyrics"],
        skip_steps_cache_type=_step_cache(model, task, values),
        skip_steps_multiplier=values["skip_steps_multiplier"],
        skip_steps_start_step_perc=values["skip_steps_start_step_perc"],
        seed=secrets.randbelow(2**32) if values["seed"] == -1 else values["seed"],
        batch_size=values["batch_size"],
        repeat_generation=values["repeat_generation"],
        inputs={name: medium.paths for name, medium in given.items()},
    )
    return Resolved(job, tuple(warnings))


def _check_inputs(catalog: Catalog, model: Model, given: Mapping[str, Media]) -> None:
    for name, medium in given.items():
        if not model.takes(name):
            rule = f"takes no such {INPUTS[name].kind}; models that do: {catalog.that_take(name)}"
            raise BadRequest(f"{name}: model '{model.id}' {rule}")
        most = model.inputs.get("max_reference_images", 0)
        if name == "image_refs" and len(medium.paths) > most:
            raise BadRequest(f"image_refs: {len(medium.paths)} images, but model '{model.id}' takes at most {most}")


def _choose_task(model: Model, given: frozenset[str], wanted: str | None) -> str:
    """The first task that the inputs fit; `wanted` narrows the choice to one. Raises BadRequest."""
    if wanted is not None and wanted not in model.pipelines:
        raise BadRequest(f"task: model '{model.id}' has no task '{wanted}'; it has {', '.join(model.tasks)}")
    tasks = [task for task in TASKS if task in model.pipelines and wanted in (None, task)]
    for task in tasks:
        if TASKS[task].fits(given) and given <= model.inputs_of(task):
            return task
    raise BadRequest(_misfit(model, given, tasks))


def _misfit(model: Model, given: frozenset[str], tasks: list[str]) -> str:
    """Why none of `tasks` can be run with these inputs."""
    for task in tasks:
        for needed in TASKS[task].needs:
            missing = [name for name in INPUTS if name in needed - given and name in model.inputs_of(task)]
            if missing and given <= model.inputs_of(task):
                return f"{missing[0]}: model '{model.id}' needs this {INPUTS[missing[0]].kind}, and none was sent"
    names = ", ".join(name for name in INPUTS if name in given) or "inputs"
    return f"{names}: model '{model.id}' can't use these together; leave one out"


def _require_packages(model: Model, task: str) -> None:
    missing = [name for name in model.pipelines[task].requires if find_spec(name) is None]
    if missing:
        raise BadRequest(
            f"model_type: '{model.id}' needs the package {missing[0]}, which is not installed; "
            f"install it with: pip install {' '.join(missing)}"
        )


def _values(model: Model, task: str, sent: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    """The value of every setting; one that the model does not have is named in `warnings` if it was sent."""
    values = _defaults(model, sent.get("use_model_defaults", True))
    values |= {key: sent[key] for key in values if key in sent}
    if values["guidance2_scale"] is None:
        values["guidance2_scale"] = values["guidance_scale"]
    for name, (_, unused) in OPTIONAL_SETTINGS.items():
        if not model.has_setting(name, task):
            if sent.get(name, unused) not in (unused, ""):
                warnings.append(f"{name}: model '{model.id}' has no such setting, the value was ignored")
            values[name] = unused
    if values["num_inference_steps"] is None:
        values["num_inference_steps"] = model.fixed_steps or 1
    return values


def _step_cache(model: Model, task: str, values: Mapping[str, Any]) -> str:
    """The step cache that was asked for, "" for none. Raises BadRequest for one that would give wrong frames."""
    wanted, there = str(values["skip_steps_cache_type"]), model.step_caches(task)
    if wanted and wanted not in there:
        usable = f"it can use: {', '.join(there)}" if there else "it can use none"
        raise BadRequest(f"skip_steps_cache_type: model '{model.id}' can't use '{wanted}' for {task}; {usable}")
    if wanted == "mag" and values["num_inference_steps"] > MOST_MAG_STEPS:
        raise BadRequest(
            f"skip_steps_cache_type: 'mag' works up to {MOST_MAG_STEPS} steps, not {values['num_inference_steps']}"
        )
    return wanted


def _defaults(model: Model, of_model: bool) -> dict[str, Any]:
    return {**CONTRACT_DEFAULTS, **FURTHER_DEFAULTS, **(model.defaults if of_model else {})}


def _size(model: Model, task: str, resolution: str) -> tuple[int, int]:
    """Width and height in pixels; sound has none."""
    if model.kind == "audio":
        return 0, 0
    matched = re.fullmatch(r"(\d{1,5})x(\d{1,5})", resolution)
    if not matched:
        raise BadRequest(f"resolution: '{resolution}' must be WIDTHxHEIGHT in pixels, such as 832x480")
    width, height = int(matched[1]), int(matched[2])
    step = model.spatial_multiple
    best = "x".join(str(_nearest_side(side, step, model.max_side)) for side in (width, height))
    if best == f"{width}x{height}":
        _require_size(model, task, best)
        return width, height
    if max(width, height) > model.max_side:
        raise BadRequest(f"resolution: '{resolution}' is over the limit of {model.max_side} pixels a side")
    raise BadRequest(f"resolution: '{resolution}' must be a multiple of {step}; nearest is {best}")


def _check_duration(model: Model, duration_s: float | None) -> None:
    if duration_s is not None and duration_s > model.max_duration_s:
        most = f"the {model.max_duration_s} s that model '{model.id}' can make"
        raise BadRequest(f"duration_seconds: {duration_s:g} is over {most}; ask for less")


def _nearest_side(side: int, step: int, most: int) -> int:
    return min(max(round(side / step), 1) * step, most // step * step)


def _require_size(model: Model, task: str, resolution: str) -> None:
    made = model.pipelines[task].resolutions
    if made and resolution not in made:
        rule = f"is no size that model '{model.id}' makes for {task}; it makes {', '.join(made)}"
        raise BadRequest(f"resolution: '{resolution}' {rule}")


def _source_frames(model: Model, task: str, given: Mapping[str, Media]) -> int | None:
    """How many frames the leading video has at the model's rate; None without one, or where it is gone on from."""
    if model.pipelines[task].continues_from:
        return None
    names = [name for name in ("video_guide", "video_source") if name in given and name in model.inputs_of(task)]
    return max(1, round(given[names[0]].seconds * model.fps)) if names else None


def _frames(
    model: Model,
    rule: FrameRule,
    video_length: int | str,
    *,
    source: int | None,
    sent: Mapping[str, Any],
    warnings: list[str],
) -> int:
    """The length in frames; a duration such as "5s" counts at the model's frame rate, to the nearest length of `rule`.

    With a `source` video of so many frames, that is the most there can be.
    """
    if model.kind != "video":
        if "video_length" in sent:
            warnings.append(f"video_length: model '{model.id}' makes no videos, the value was ignored")
        return 1 if model.kind == "image" else 0
    duration = isinstance(video_length, str)
    wanted = round(float(str(video_length)[:-1]) * model.fps) if duration else int(video_length)
    if not 1 <= wanted <= MAX_FRAMES:
        limits = f"makes {wanted} frames at {model.fps} a second, but must make 1 to {MAX_FRAMES}"
        raise BadRequest(f"video_length: '{video_length}' {limits}")
    if source is not None and source < wanted:
        return _frames_of_source(rule, wanted, source, sent, warnings)
    frames = rule.nearest(wanted)
    if abs(frames - wanted) >= (rule.step if duration else 1):
        lengths = f"{rule.step}k+{rule.offset}"
        warnings.append(
            f"video_length: {wanted} was changed to {frames}, the nearest that model '{model.id}' can make ({lengths})"
        )
    return frames


def _frames_of_source(rule: FrameRule, wanted: int, source: int, sent: Mapping[str, Any], warnings: list[str]) -> int:
    frames = rule.longest_within(source)
    if "video_length" in sent:
        warnings.append(f"video_length: {wanted} was changed to {frames}, the video that was sent has {source} frames")
    return frames


def settings(job: Job, seed: int | None = None) -> dict[str, Any]:
    """The job under the contract's own field names, as status answers and files carry it.

    What the model does not have is left out; inputs are told by the SHA-256 of their bytes.
    """
    values = {
        "model_type": job.model,
        "task": job.task,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "resolution": f"{job.width}x{job.height}" if job.width else None,
        "video_length": job.frames or None,
        "fps": job.fps or None,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance_scale,
        "guidance2_scale": job.guidance2_scale,
        "embedded_guidance_scale": job.embedded_guidance_scale,
        "flow_shift": job.flow_shift,
        "denoising_strength": job.denoising_strength,
        "duration_seconds": job.duration_s,
        "lyrics": job.lyrics or None,
        **_lora_settings(job),
        **({name: getattr(job, name) for name in CACHE_SETTINGS} if job.skip_steps_cache_type else {}),
        "sliding_window_size": job.window_frames or None,
        "sliding_window_overlap": job.window_overlap or None,
        "sliding_window_color_correction_strength": job.color_correction if job.window_frames else None,
        "seed": job.seed if seed is None else seed,
        "batch_size": job.batch_size,
        "repeat_generation": job.repeat_generation,
        **{name: [path.name for path in paths] for name, paths in job.inputs.items()},
    }
    return {name: value for name, value in values.items() if value is not None}


def _lora_settings(job: Job) -> dict[str, Any]:
    """As a request would say it."""
    if not job.loras:
        return {}
    strengths = (";".join(",".join(f"{value:g}" for value in phase) for phase in lora.phases) for lora in job.loras)
    return {"activated_loras": [lora.path.name for lora in job.loras], "loras_multipliers": " ".join(strengths)}


def default_settings(model: Model) -> dict[str, Any]:
    """What a request that names only a prompt gets, under the contract's field names."""
    task = model.tasks[0]
    hidden = {name for name in OPTIONAL_SETTINGS if not model.has_setting(name, task)}
    values = _defaults(model, True)
    hidden |= _NOT_OF_KIND[model.kind] | {"prompt"}
    if not values["skip_steps_cache_type"]:
        hidden |= set(CACHE_SETTINGS)
    hidden |= set(windows.SETTINGS)  # they mean nothing to a video of the usual length
    shown = {key: value for key, value in values.items() if key not in hidden and value is not None}
    return {"prompt": "", **shown}


_NOT_OF_KIND: Mapping[str, frozenset[str]] = {
    "video": frozenset(),
    "image": frozenset({"video_length"}),
    "audio": frozenset({"video_length", "resolution"}),
}


class Admission:
    """Interim."""

    def __init__(self, config: Any, catalog: Any, inputs: Any, machines: Any) -> None:
        self.config, self.catalog, self.inputs, self.machines = config, catalog, inputs, machines

    def require_weights(self, model: Any) -> Any:
        return require_weights(model, self.config)

    def admit(self, body: Any, store: bool) -> Resolved:
        return admit(self, body, store)

    def cost(self, job: Any, known_s: Any) -> Any:
        return cost(self, job, known_s)


def cost(app: Any, job: Job, known_s: Any) -> dict[str, Any] | None:
    """What the job will take; None if no device was measured, or if it fits on none."""
    try:
        found = estimated(app, job)
    except EngineError:
        return None
    if found is None:
        return None
    return {**vars(found), "seconds": round(found.seconds, 1) if known_s is None else known_s}


def estimated(app: Any, job: Job) -> Any:
    """The estimate by the memory plan. Raises EngineError if the job seems to fit nowhere."""
    from engine.planning.estimate import estimate

    config = app.config
    return estimate(
        app.catalog.get(job.model),
        job,
        app.machines(),
        profile=config.profile,
        quantization=config.transformer_quantization,
        vae_config=config.vae_config,
    )


def doubts(app: Any, job: Job) -> tuple[str, ...]:
    """Why a job may fail for want of memory. A warning and no refusal: an estimate may be wrong."""
    try:
        estimated(app, job)
    except EngineError as error:
        return (str(error),)
    return ()


def admit(app: Any, body: Mapping[str, Any], store: bool) -> Resolved:
    """Check everything, decide everything, then with `store` keep the inputs. Blocks.

    Raises BadRequest or UnknownModel, and has written nothing then.
    """
    model = app.catalog.get(body.get("model_type") or app.config.default_model)
    found = require_weights(model, app.config)
    files = {name: several(body[name]) for name in INPUTS if body.get(name, []) != []}
    given = {name: checked_input(app, name, datas) for name, datas in files.items()}
    resolved = resolve(app.catalog, model, body, given)
    if body.get("activated_loras"):
        job = dataclasses.replace(resolved.job, loras=chosen_loras(app, model, resolved.job.task, found, body))
        resolved = dataclasses.replace(resolved, job=job)
    for data in (data for datas in files.values() for data in datas if store):
        app.inputs.store(data)
    unknown = tuple(f"{name}: there is no such field, it was ignored" for name in body.get(UNKNOWN, ()))
    return dataclasses.replace(resolved, warnings=(*unknown, *resolved.warnings, *doubts(app, resolved.job)))


def chosen_loras(app: Any, model: Model, task: str, found: Weights | None, body: Mapping[str, Any]) -> tuple[Lora, ...]:
    """The LoRAs of a request. Raises BadRequest for one that is not there or does not fit the weights."""
    if not model.pipelines[task].loras:
        raise BadRequest(f"activated_loras: model '{model.id}' takes no LoRAs; leave them out")
    if found is None:
        remedy = weights.remedy(model, app.config.models_dir)
        raise BadRequest(f"activated_loras: '{model.id}' is not installed, so nothing tells whether they fit; {remedy}")
    names, multipliers = body["activated_loras"], body.get("loras_multipliers", "")
    try:
        return loras.chosen(names, multipliers, model, app.config.loras_dir, found.folder)
    except loras.BadLora as error:
        raise BadRequest(str(error)) from None


def several(value: bytes | list[bytes]) -> tuple[bytes, ...]:
    """The files of one field."""
    return tuple(value) if isinstance(value, list) else (value,)


UNKNOWN = " unknown"  # not a name that a field can have


def require_weights(model: Model, config: Any) -> Weights | None:
    """The model's weights, or None if they are to be fetched. Raises BadRequest with what helps if they may not be."""
    if refusal := capabilities.quantization_refusal(config.transformer_quantization, model):
        raise BadRequest(refusal)
    found = weights.locate(model, config.models_dir)
    if found is None and not config.allow_download:
        remedy = weights.remedy(model, config.models_dir)
        raise BadRequest(f"model_type: '{model.id}' is not installed; {remedy}")
    return found


def checked_input(app: Any, name: str, datas: tuple[bytes, ...]) -> Media:
    """The input of one field, each file whole and of a size that fits in memory. Raises BadRequest."""
    about, seconds = INPUTS[name], 0.0
    for place, data in enumerate(datas):
        where = f"{name}[{place}]" if about.several else name
        try:
            seconds = length_s(data, about.kind, app.config.max_image_pixels)
        except (media.BadImage, footage.BadFootage) as error:
            raise BadRequest(f"{where}: the {WORDS[about.kind]} {error}") from None
    return Media(tuple(app.inputs.path(data) for data in datas), seconds)


WORDS = {"image": "picture", "video": "video", "audio": "sound"}


def length_s(data: bytes, kind: str, max_pixels: int) -> float:
    """Seconds of a video or a sound, 0 of a picture, once it is known to be whole. Raises BadImage or BadFootage."""
    if kind != "image":
        return footage.check(data, kind, max_pixels)
    media.check_image(data, max_pixels)
    return 0.0
