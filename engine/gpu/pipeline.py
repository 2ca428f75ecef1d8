"""Load a diffusers pipeline, and run a Job through it.

What differs from class to class is the catalogue's table of parameter names; there is no branch on a class here.
"""

import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, reduce
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers.models.attention_dispatch import attention_backend

from engine.catalog import Model, Pipeline
from engine.gpu import attention, caching, compiling, decoding, inputs, memory, prompts, results, single_file, sliding
from engine.gpu.adapters import Adapters, load_file
from engine.gpu.inputs import Call
from engine.gpu.meter import Meter
from engine.gpu.results import Clip
from engine.gpu.steps import StepCounter
from engine.job import SEED_RANGE, EngineError, Job, Phase
from engine.weights import Weights
from engine.work import Work

if TYPE_CHECKING:
    from engine.gpu.team import Team

# The meter reports progress, and a fault is an exception: bars and hints would only fill the log.
for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
NOTHING: Mapping[str, Any] = MappingProxyType({})
LATENT = "latent"
CHECKS = 8  # for a cancel, within a call of a denoiser: a call takes up to a minute, and each look a hundredth of a ms


def load(
    model: Model,
    pipeline: Pipeline,
    weights: Weights,
    device: torch.device,
    ready: Mapping[str, Any] = NOTHING,
    *,
    without: Collection[str] = (),
) -> Any:
    """The model's pipeline, in the catalogue's dtypes on a GPU and in float32 on a CPU. It lies in RAM.

    `ready` are denoisers that are there already, with the recipe in them; their weights are not read. Nor are the
    components `without` which the pipeline is to be.
    Only safetensors are read: a pickled checkpoint could run code.
    """
    options: dict[str, Any] = {"variant": model.variant} if model.variant else {}
    parts = {name: folder for name, folder in weights.parts.items() if name not in without}
    options |= {name: _part(folder, model, name, device) for name, folder in parts.items()}
    if weights.files:
        options |= single_file.components(_class(pipeline), weights, partial(dtype_of, model, device))
    options |= {**ready, **dict.fromkeys(without)}
    pipe = _class(pipeline).from_pretrained(
        weights.folder, dtype=_dtypes(model, device), use_safetensors=True, local_files_only=True, **options
    )
    _set_up(pipe, model, pipeline)
    if not ready:
        _fuse_recipe(pipe, model, weights)
    return pipe


def _set_up(pipe: Any, model: Model, pipeline: Pipeline) -> None:
    """What the catalogue says that a fresh pipeline needs."""
    pipe.set_progress_bar_config(disable=True)
    if pipeline.tiled_vae and pipe.vae:
        pipe.vae.enable_tiling()
    if model.attention_backend:
        attention.set_backend(pipe.transformer, model.attention_backend)
    if model.schedule:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **model.schedule)


def others(weights: Weights) -> list[str]:
    """The components that are neither denoisers nor the scheduler."""
    index = json.loads((weights.folder / "model_index.json").read_text())
    named = [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]
    return [name for name in named if name != "scheduler" and not memory.is_denoiser(name)]


def _fuse_recipe(pipe: Any, model: Model, weights: Weights) -> None:
    """Add the LoRAs that make this model out of its base to the weights themselves: they cost nothing at run time."""
    recipe = list(zip(model.recipe_loras, weights.loras, strict=True))
    if not recipe:
        return
    for lora, path in recipe:
        load_file(pipe, path, lora["adapter"], lora["target"])
    pipe.set_adapters([lora["adapter"] for lora, _ in recipe], [lora["weight"] for lora, _ in recipe])
    pipe.fuse_lora(components=sorted({lora["target"] for lora, _ in recipe}))
    pipe.unload_lora_weights()


def _part(folder: Path, model: Model, name: str, device: torch.device) -> Any:
    """A component from a repository of its own, in the class that its files name."""
    if name.startswith("tokenizer"):  # it may lie beside its model, whose configuration says nothing of it
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not (folder / "config.json").is_file():
        return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    config = json.loads((folder / "config.json").read_text())
    own = config.get("_class_name")
    cls = getattr(diffusers, own) if own else getattr(transformers, config["architectures"][0])
    dtype = dtype_of(model, device, name)
    return cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)


def dtype_of(model: Model, device: torch.device, name: str) -> torch.dtype:
    dtypes = _dtypes(model, device)
    return dtypes.get(name, dtypes["default"]) if isinstance(dtypes, dict) else dtypes


def _class(pipeline: Pipeline) -> Any:
    try:
        return getattr(diffusers, pipeline.cls)
    except AttributeError:
        raise EngineError(f"This diffusers ({diffusers.__version__}) has no {pipeline.cls}.", "no_such_class") from None


def _dtypes(model: Model, device: torch.device) -> torch.dtype | dict[str, torch.dtype]:
    if device.type == "cpu":
        return torch.float32
    by_component = {name: getattr(torch, dtype) for name, dtype in model.dtypes.items()}
    return {"default": by_component.get("transformer", torch.bfloat16), **by_component}


def sibling(pipe: Any, pipeline: Pipeline) -> Any:
    """The components of `pipe` behind another class. (`from_pipe` would cast them all to one dtype.)"""
    cls = _class(pipeline)
    if type(pipe) is cls:
        return pipe
    known = {**pipe.config, **pipe.components}
    other = cls(**{name: known[name] for name in inspect.signature(cls).parameters if name in known})
    other.set_progress_bar_config(disable=True)
    prompts.inherit(pipe, other)
    return other


def render(
    pipe: Any, model: Model, job: Job, meter: Meter, adapters: Adapters | None = None, *, team: "Team | None" = None
) -> Iterator[Clip]:
    """Run `job`, together with `team`, and yield its clips as they are ready, file i with the seed `job.seed + i`.

    Reports encoding, each denoising step and decoding to `meter`, from where a cancel raises Cancelled.
    """
    work, numbers = Work.of(model, job), count()
    loras = adapters or Adapters()

    def run(call: Call) -> Iterator[Clip]:
        meter.enter(Phase.ENCODING)  # before the run is counted on: progress must not jump ahead and stay there
        meter.begin_run(next(numbers), work.runs, job.steps)
        return _run(pipe, model, call, meter, loras, team=team)

    with _reported(pipe, meter, alone=team is None):
        for seeds in seeds_of_calls(job, work.batch):
            if job.window_frames:
                yield Clip(seeds[0], sliding.frames(model, job, seeds[0], lambda call: _only_frames(run(call))))
            else:
                yield from run(Call(job, seeds))


def _only_frames(clips: Iterator[Clip]) -> torch.Tensor:
    """(F, H, W, 3) uint8 of a call that makes one video."""
    (clip,) = clips
    assert clip.frames is not None
    return torch.cat(list(clip.frames))


def seeds_of_calls(job: Job, size: int) -> list[list[int]]:
    """The seeds of the job's files, `size` of them made at once."""
    seeds = [(job.seed + i) % SEED_RANGE for i in range(job.batch_size * job.repeat_generation)]
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def sample_rate(pipe: Any, pipeline: Pipeline) -> int:
    """Samples a second of the sound that the pipeline makes; 0 where it makes none."""
    return int(reduce(getattr, pipeline.sample_rate.split("."), pipe)) if pipeline.sample_rate else 0


def _run(
    pipe: Any, model: Model, call: Call, meter: Meter, adapters: Adapters, *, team: "Team | None"
) -> Iterator[Clip]:
    """One call of the pipeline, and the clips that it makes."""
    job, pipeline = call.job, model.pipelines[call.job.task]
    with prepared(pipe, model, job, adapters) as (fitted, set_strengths):
        torch.manual_seed(call.seeds[0])  # some classes draw more than the noise, and not from their generator
        together = team.together(fitted, job, set_strengths) if team else nullcontext(set_strengths)
        with together as after_step, StepCounter(fitted, job, pipeline, meter, after_step).counting() as arguments:
            output = fitted(**call_arguments(fitted, model, call), **arguments)
    if pipeline.output_type == LATENT:
        return _decoded(fitted, output.frames, call)
    return results.clips(output, pipeline, call.seeds, sample_rate(fitted, pipeline), job.frames)


@contextmanager
def prepared(pipe: Any, model: Model, job: Job, adapters: Adapters) -> Iterator[tuple[Any, Callable[[int], None]]]:
    """Within the block, the pipeline for the job's task with its schedule, guidance, LoRAs and step cache.

    With it comes what is to be called after each step with the number of steps that are done.
    """
    pipeline = model.pipelines[job.task]
    pipe = sibling(pipe, pipeline)
    if job.flow_shift is not None and "shift_param" in model.scheduler:
        _shift(pipe, model.scheduler["shift_param"], job.flow_shift)
    if pipeline.guider and job.guidance_scale is not None:
        _guide(pipe, job.guidance_scale)
    if pipeline.side_attribute:
        setattr(pipe, pipeline.side_attribute, _latent_side(pipe, job))
    kernel = attention_backend(model.attention_backend or attention.NATIVE)
    with adapters.applied(pipe, job) as set_strengths, caching.cached(pipe, model, job), kernel:
        compiling.suit(pipe, job)
        yield pipe, set_strengths


def _decoded(pipe: Any, latents: torch.Tensor, call: Call) -> Iterator[Clip]:
    """The clips of Wan's latents, (B, C, F, H, W); their frames are decoded when they are asked for."""
    for i, seed in enumerate(call.seeds):
        yield Clip(seed, decoding.pieces(pipe, latents[i : i + 1], call.job.frames))


def _shift(pipe: Any, parameter: str, value: float) -> None:
    """Let the scheduler have this shift; one that has it stays, and begins anew when its timesteps are set."""
    scheduler = pipe.scheduler
    if scheduler.config[parameter] != value:
        pipe.scheduler = type(scheduler).from_config(scheduler.config, **{parameter: value})


def _guide(pipe: Any, scale: float) -> None:
    """Set the strength of the guiders; some classes have a second one for prompts with writing in them."""
    for name in ("guider", "ocr_guider"):
        if (guider := getattr(pipe, name, None)) is not None:
            setattr(pipe, name, guider.new(guidance_scale=scale))


def _latent_side(pipe: Any, job: Job) -> float:
    """The side of a square of the job's area, in latent pixels; a touch longer, as sizes are rounded down."""
    return float((job.width * job.height) ** 0.5 / pipe.vae_scale_factor * (1 + 1e-9))


def call_arguments(pipe: Any, model: Model, call: Call) -> dict[str, Any]:
    """The keyword arguments of the pipeline's `__call__`."""
    job, seeds, pipeline = call.job, call.seeds, model.pipelines[call.job.task]
    roles = {**_plain_roles(model, job), **inputs.roles(pipeline, call, sample_rate(pipe, pipeline))}
    # A CPU generator draws the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    roles |= {"seed": generators[0], "output_type": pipeline.output_type}
    if len(seeds) > 1:  # a list of prompts, not `num_videos_per_prompt`: that breaks classes with an image encoder
        roles |= {"seed": generators, "prompt": [job.prompt] * len(seeds)}
    named = {pipeline.call[role]: value for role, value in roles.items() if role in pipeline.call}
    unset = {name: None for name, steps in pipeline.only_at_steps.items() if job.steps != steps}
    return {
        **model.extra_call,
        **pipeline.by_task.get(job.task, {}),
        **{name: value for name, value in named.items() if value is not None},
        **unset,
    }


def _plain_roles(model: Model, job: Job) -> dict[str, Any]:
    pipeline = model.pipelines[job.task]
    steps = job.steps if pipeline.stages == 1 else [-(-job.steps // pipeline.stages)] * pipeline.stages
    return {
        "prompt": _marked(job.prompt, pipeline.picture_mark, len(job.inputs.get("image_refs", ()))),
        "negative_prompt": _negative_prompt(model, job),
        "frames": model.frames.told(job.frames),
        "window": min(model.window_frames, job.frames) or None,
        "fps": job.fps,
        "steps": steps if model.has_setting("num_inference_steps", job.task) else None,
        "guidance": job.guidance_scale,
        "guidance_2": job.guidance2_scale,
        "embedded_guidance": job.embedded_guidance_scale,
        "width": job.width,
        "height": job.height,
        "area": job.width * job.height,
        "shift": job.flow_shift,
        "strength": job.denoising_strength,
        "duration": job.duration_s,
        "lyrics": job.lyrics,
    }


def _negative_prompt(model: Model, job: Job) -> str | None:
    if not model.has_setting("negative_prompt", job.task):
        return None
    return job.negative_prompt or (None if model.pipelines[job.task].null_negative else "")


def _marked(prompt: str, mark: str, pictures: int) -> str:
    """The prompt with a mark for each reference picture in front, where the class wants them and none are there."""
    marks = [mark.format(number + 1) for number in range(pictures)] if mark else []
    return " ".join([*(each for each in marks if each not in prompt), prompt])


@contextmanager
def _reported(pipe: Any, meter: Meter, *, alone: bool) -> Iterator[None]:
    """Within the block, `meter` hears of every denoiser and VAE decoder call, and can cancel there.

    One who works `alone` can be stopped at some blocks of a denoiser too: nobody waits for the others.
    """
    with ExitStack() as hooks:
        for module, phase in _milestones(pipe, alone):
            handle = module.register_forward_pre_hook(lambda *_, phase=phase: meter.enter(phase))
            hooks.callback(handle.remove)
        yield


def _milestones(pipe: Any, blocks: bool) -> Iterator[tuple[torch.nn.Module, Phase]]:
    for denoiser in memory.denoisers(pipe).values():
        yield denoiser, Phase.DENOISING
        if blocks:
            every = list(getattr(denoiser, "blocks", ()))
            yield from ((block, Phase.DENOISING) for block in every[:: max(1, len(every) // CHECKS)])
    if (decoder := getattr(getattr(pipe, "vae", None), "decoder", None)) is not None:
        yield decoder, Phase.DECODING
