"""Admission: how a request becomes a Job. What it leaves open is decided here, and what can't be done is refused.

A Job then needs no default and no chance, and nothing is queued that the model could not run.
"""

import asyncio
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from engine import capabilities, hints
from engine.catalog import loras, weights
from engine.catalog.abilities import INPUTS, TASKS
from engine.catalog.models import Catalog, FrameRule, Model
from engine.catalog.weights import Weights
from engine.files.checks import Checks, Unusable
from engine.files.inputs import Inputs, Sent
from engine.job import EngineError, Job, Lora
from engine.planning import windows
from engine.planning.machine import Machine
from engine.planning.placement import Estimate, estimate
from engine.settings import SETTINGS, defaults, job_fields

MAX_FRAMES = int(SETTINGS["video_length"].high)
MOST_MAG_STEPS = 50  # the calibrations are of that many at most
UNKNOWN = " unknown"  # in a checked body: the fields that do not exist; no field can have this name
MEDIA_WORDS = {"image": "picture", "video": "video", "audio": "sound"}


class BadRequest(Exception):
    """The request can't be run as it is: one sentence that names the field, the value, the rule and the remedy."""


class Media(NamedTuple):
    """A checked input: the files of one field, and the length of a video or a sound."""

    paths: tuple[Path, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Resolved:
    """A Job, and what was changed or ignored on the way to it, a sentence each."""

    job: Job
    warnings: tuple[str, ...]
    estimate: Estimate | None = None  # None: no device has been measured, or the job seems to fit on none


@dataclass(frozen=True)
class Policy:
    """The part of the configuration that decides what is accepted."""

    default_model: str
    models_dir: Path
    loras_dir: Path
    allow_download: bool
    profile: float
    transformer_quantization: str
    vae_config: int


class Admission:
    """Turns checked request bodies into Jobs. `machines` returns the devices that have been measured so far."""

    def __init__(
        self,
        catalog: Catalog,
        inputs: Inputs,
        checks: Checks,
        policy: Policy,
        machines: Callable[[], Iterable[Machine]],
    ) -> None:
        self._catalog, self._inputs, self._checks = catalog, inputs, checks
        self._policy, self._machines = policy, machines

    async def examine(self, body: Mapping[str, Any], client: str) -> Mapping[str, Any]:
        """Return the body, whose videos and sounds have their lengths, once every file in it has been decoded.

        Raises BadRequest, UnknownModel and NoStorage. It may be cancelled.
        """
        files = files_of(body)
        if not files:
            return body
        await asyncio.to_thread(lambda: self.require_weights(self._model(body)))
        found = [(name, place, sent) for name, sents in files.items() for place, sent in enumerate(sents)]
        try:
            kinds = [(INPUTS[name].kind, sent.path) for name, _, sent in found]
            lengths = await self._checks.seconds(kinds, client)
        except Unusable as fault:
            (at, sentence), (name, place, _) = fault.args, found[fault.args[0]]
            where = f"{name}[{place}]" if INPUTS[name].several else name
            raise BadRequest(f"{where}: the {MEDIA_WORDS[kinds[at][0]]} {sentence}") from None
        known = dict[str, list[Sent]]()
        for (name, _, sent), seconds in zip(found, lengths, strict=True):
            known.setdefault(name, []).append(sent._replace(seconds=seconds))
        return {**body, **known}

    def _model(self, body: Mapping[str, Any]) -> Model:
        return self._catalog.get(body.get("model_type") or self._policy.default_model)

    def admit(self, body: Mapping[str, Any], *, store: bool) -> Resolved:
        """Check and decide all, or raise BadRequest or UnknownModel; then, with `store`, keep the inputs. Blocks.

        The files of `body` have been examined.
        """
        model = self._model(body)
        found = self.require_weights(model)
        files = files_of(body)
        given = {name: Media(tuple(map(self._inputs.path, sents)), sents[0].seconds) for name, sents in files.items()}
        resolved = resolve(self._catalog, model, body, given)
        job = resolved.job
        if body.get("activated_loras"):
            job = replace(job, loras=self._loras(model, job.task, found, body))
        for sent in (sent for sents in files.values() for sent in sents if store):
            self._inputs.store(sent)
        warnings = (*hints.ignored(body.get(UNKNOWN, ())), *resolved.warnings)
        policy = self._policy
        memory: dict[str, Any] = {"profile": policy.profile, "quantization": policy.transformer_quantization}
        try:
            needs = estimate(model, job, self._machines(), **memory, vae_config=policy.vae_config)
        except EngineError as error:  # a warning and no refusal: an estimate may be wrong
            return Resolved(job, (*warnings, str(error)))
        return Resolved(job, warnings, needs)

    def require_weights(self, model: Model) -> Weights | None:
        """The model's weights, None if they are to be downloaded. Raises BadRequest where the model can't run."""
        if refusal := capabilities.quantization_refusal(self._policy.transformer_quantization, model):
            raise BadRequest(refusal)
        found = weights.locate(model, self._policy.models_dir)
        if found is None and not self._policy.allow_download:
            remedy = weights.remedy(model, self._policy.models_dir)
            raise BadRequest(f"model_type: '{model.id}' is not installed; {remedy}")
        return found

    def require(self, job: Job) -> None:
        """Raises BadRequest if a job that was admitted once can't be run any more. Blocks."""
        if job.model not in self._catalog:
            raise BadRequest(f"model_type: '{job.model}' is no longer in the catalogue; bring it back, or take another")
        model = self._catalog.get(job.model)
        self.require_weights(model)
        _choose_task(model, frozenset(job.inputs), job.task)
        require_files(job)

    def _loras(self, model: Model, task: str, found: Weights | None, body: Mapping[str, Any]) -> tuple[Lora, ...]:
        """The LoRAs of a request. Raises BadRequest for one that is not there or does not fit the weights."""
        if not model.pipelines[task].loras:
            raise BadRequest(f"activated_loras: model '{model.id}' takes no LoRAs; leave them out")
        if found is None:
            remedy = weights.remedy(model, self._policy.models_dir)
            reason = f"'{model.id}' is not installed, so it can't be checked whether they fit"
            raise BadRequest(f"activated_loras: {reason}; {remedy}")
        names, multipliers = list(body["activated_loras"]), body.get("loras_multipliers", "")
        try:
            return loras.chosen(names, multipliers, model, self._policy.loras_dir, found.folder)
        except loras.BadLora as error:
            raise BadRequest(str(error)) from None


def files_of(body: Mapping[str, Any]) -> dict[str, Sequence[Sent]]:
    """Return the files of a checked body by their fields, at least one each."""
    sent = {name: body[name] for name in INPUTS if body.get(name)}
    return {name: value if isinstance(value, list) else [value] for name, value in sent.items()}


def require_files(job: Job) -> None:
    """Raises BadRequest if an input or a LoRA of an admitted job is gone. Blocks."""
    for name, paths in job.inputs.items():
        if not all(map(_readable, paths)):
            raise BadRequest(f"{name}: its file is no longer in state_path; send it again with a new request")
    for path in (lora.path for lora in job.loras if not _readable(lora.path)):
        raise BadRequest(f"activated_loras: '{path.name}' is no longer in loras_dir; put it back")


def _readable(path: Path) -> bool:
    return os.access(path, os.R_OK)


def resolve(catalog: Catalog, model: Model, sent: Mapping[str, Any], given: Mapping[str, Media]) -> Resolved:
    """Decide everything that `sent` leaves open. `given` are the stored inputs by field name.

    What was sent wins over the defaults of the model, or of the contract. Raises BadRequest for what can't be done.
    """
    _check_inputs(catalog, model, given)
    task = _choose_task(model, frozenset(given), sent.get("task"))
    if missing := [name for name in model.pipelines[task].requires if find_spec(name) is None]:
        reason = f"'{model.id}' needs the package {missing[0]}, which is not installed"
        raise BadRequest(f"model_type: {reason}; install it with: pip install {' '.join(missing)}")
    warnings: list[str] = []
    values = _values(model, task, sent, warnings)
    _check_values(model, task, values)
    width, height = _size(model, task, values["resolution"])
    window, overlap = windows.chosen(model, task, values, warnings)
    rule = replace(model.frames, max=MAX_FRAMES) if window else model.frames
    source = _source_frames(model, task, given)
    length, was_sent = values["video_length"], "video_length" in sent
    frames = _frames(model, rule, length, source=source, was_sent=was_sent, warnings=warnings)
    is_long = 0 < window < frames
    decided = {
        "model": model.id,
        "task": task,
        "width": width,
        "height": height,
        "frames": frames,
        "window_frames": window if is_long else 0,
        "window_overlap": overlap if is_long else 0,
        "color_correction": values["sliding_window_color_correction_strength"] if is_long else 0.0,
        "fps": model.fps,
        "seed": secrets.randbelow(2**32) if values["seed"] == -1 else values["seed"],
        "inputs": {name: files.paths for name, files in given.items()},
    }
    return Resolved(Job(**job_fields(values) | decided), tuple(warnings))


def _check_inputs(catalog: Catalog, model: Model, given: Mapping[str, Media]) -> None:
    for name, files in given.items():
        if not model.takes(name):
            rule = f"takes no such {INPUTS[name].kind}; models that do: {catalog.that_take(name)}"
            raise BadRequest(f"{name}: model '{model.id}' {rule}")
        most = model.inputs.get("max_reference_images", 0)
        if name == "image_refs" and len(files.paths) > most:
            raise BadRequest(f"image_refs: {len(files.paths)} images, but model '{model.id}' takes at most {most}")


def _choose_task(model: Model, given: frozenset[str], wanted: str | None) -> str:
    """The first task that the inputs fit; `wanted` narrows the choice to one. Raises BadRequest."""
    if wanted is not None and wanted not in model.pipelines:
        raise BadRequest(f"task: model '{model.id}' has no task '{wanted}'; it has {', '.join(model.tasks)}")
    tasks = [task for task in TASKS if task in model.pipelines and wanted in (None, task)]
    for task in tasks:
        if TASKS[task].fits(given) and given <= model.inputs_of(task):
            return task
    for task in (task for task in tasks if given <= model.inputs_of(task)):
        for needed in TASKS[task].needs:
            if missing := [name for name in INPUTS if name in (needed - given) & model.inputs_of(task)]:
                kind = INPUTS[missing[0]].kind
                raise BadRequest(f"{missing[0]}: model '{model.id}' needs this {kind}, and none was sent")
    names = ", ".join(name for name in INPUTS if name in given) or "inputs"
    raise BadRequest(f"{names}: model '{model.id}' can't use these together; leave one out")


def _values(model: Model, task: str, sent: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    """The value of every setting; one that the model does not have is named in `warnings` if it was sent."""
    values = defaults(model.defaults if sent.get("use_model_defaults", True) else {})
    values |= {name: sent[name] for name in values if name in sent}
    if values["guidance2_scale"] is None:
        values["guidance2_scale"] = values["guidance_scale"]
    for name, setting in SETTINGS.items():
        if not model.has_setting(name, task):
            if sent.get(name, setting.unused) not in (setting.unused, ""):
                warnings.append(f"{name}: model '{model.id}' has no such setting, the value was ignored")
            values[name] = setting.unused
    values["prompt"] = sent["prompt"]  # the task's name, even where the model reads none
    if values["num_inference_steps"] is None:
        values["num_inference_steps"] = model.fixed_steps or 1
    return values


def _check_values(model: Model, task: str, values: Mapping[str, Any]) -> None:
    """Raises BadRequest for a sound that is too long, and for a step cache that would give wrong frames."""
    if (values["duration_seconds"] or 0) > model.max_duration_s:
        most = f"the {model.max_duration_s} s that model '{model.id}' can make"
        raise BadRequest(f"duration_seconds: {values['duration_seconds']:g} is over {most}; ask for less")
    wanted, usable = values["skip_steps_cache_type"], model.step_caches(task)
    if wanted and wanted not in usable:
        choice = f"it can use: {', '.join(usable)}" if usable else "it can use none"
        raise BadRequest(f"skip_steps_cache_type: model '{model.id}' can't use '{wanted}' for {task}; {choice}")
    if wanted == "mag" and (steps := values["num_inference_steps"]) > MOST_MAG_STEPS:
        raise BadRequest(f"skip_steps_cache_type: 'mag' works up to {MOST_MAG_STEPS} steps, not {steps}")


def _size(model: Model, task: str, resolution: str) -> tuple[int, int]:
    """Width and height in pixels; sound has none."""
    if model.kind == "audio":
        return 0, 0
    matched = re.fullmatch(r"(\d{1,5})x(\d{1,5})", resolution)
    if not matched:
        raise BadRequest(f"resolution: '{resolution}' must be {SETTINGS['resolution'].pattern_rule}")
    width, height = int(matched[1]), int(matched[2])
    step, made = model.spatial_multiple, model.pipelines[task].resolutions
    most = model.max_side // step
    best = "x".join(str(min(max(round(side / step), 1), most) * step) for side in (width, height))
    if max(width, height) > model.max_side:
        raise BadRequest(f"resolution: '{resolution}' is over the limit of {model.max_side} pixels a side")
    if best != f"{width}x{height}":
        raise BadRequest(f"resolution: '{resolution}' must be a multiple of {step}; nearest is {best}")
    if made and best not in made:
        rule = f"is no size that model '{model.id}' makes for {task}; it makes {', '.join(made)}"
        raise BadRequest(f"resolution: '{resolution}' {rule}")
    return width, height


def _source_frames(model: Model, task: str, given: Mapping[str, Media]) -> int | None:
    """How many frames the leading video has at the model's rate; None without one, or if the task continues it."""
    if model.pipelines[task].continues_from:
        return None
    names = [name for name in ("video_guide", "video_source") if name in given and name in model.inputs_of(task)]
    return max(1, round(given[names[0]].seconds * model.fps)) if names else None


def _frames(
    model: Model, rule: FrameRule, length: int | str, *, source: int | None, was_sent: bool, warnings: list[str]
) -> int:
    """The length in frames, to the nearest of `rule`, and of a `source` video no more than it has."""
    if model.kind != "video":
        return 1 if model.kind == "image" else 0
    duration = isinstance(length, str)
    wanted = round(float(str(length)[:-1]) * model.fps) if duration else int(length)
    if not 1 <= wanted <= MAX_FRAMES:
        limits = f"makes {wanted} frames at {model.fps} a second, but must make 1 to {MAX_FRAMES}"
        raise BadRequest(f"video_length: '{length}' {limits}")
    if source is not None and source < wanted:
        frames, reason = rule.longest_within(source), f"the video that was sent has {source} frames"
        if was_sent:
            warnings.append(f"video_length: {wanted} was changed to {frames}, {reason}")
        return frames
    frames = rule.nearest(wanted)
    if abs(frames - wanted) >= (rule.step if duration else 1):
        reason = f"the nearest that model '{model.id}' can make ({rule.step}k+{rule.offset})"
        warnings.append(f"video_length: {wanted} was changed to {frames}, {reason}")
    return frames
