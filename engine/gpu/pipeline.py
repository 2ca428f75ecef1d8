"""Load a diffusers pipeline, and run a Job through it.

What differs from class to class is the catalogue's table of parameter names; there is no branch on a class here.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image, ImageOps

from engine import media
from engine.catalog import SEED_RANGE, Model, Pipeline
from engine.gpu.meter import Meter
from engine.job import EngineError, Job, Phase
from engine.weights import Weights

MID_GREY = (128, 128, 128)  # what a masked control video holds where a frame is to be generated
KEEP, GENERATE = 0, 255
# The meter reports progress, and a fault is an exception: bars and hints would only fill the log.
for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True)
class Clip:
    """One finished video (or picture): `frames` (F, H, W, 3) uint8 on the CPU."""

    seed: int
    frames: torch.Tensor


def load(model: Model, pipeline: Pipeline, weights: Weights, device: torch.device) -> Any:
    """The model's pipeline, in the catalogue's dtypes on a GPU and in float32 on a CPU. It lies in RAM.

    Only safetensors are read: a pickled checkpoint could run code.
    """
    options = {"variant": model.variant} if model.variant else {}
    pipe = _class(pipeline).from_pretrained(
        weights.folder, dtype=_dtypes(model, device), use_safetensors=True, local_files_only=True, **options
    )
    pipe.set_progress_bar_config(disable=True)
    _fuse_recipe(pipe, model, weights)
    return pipe


def _fuse_recipe(pipe: Any, model: Model, weights: Weights) -> None:
    """Add the LoRAs that make this model out of its base to the weights themselves: they cost nothing at run time."""
    recipe = list(zip(model.recipe_loras, weights.loras, strict=True))
    if not recipe:
        return
    for lora, path in recipe:
        second = {"load_into_transformer_2": True} if lora["target"] == "transformer_2" else {}
        pipe.load_lora_weights(
            path.parent,
            weight_name=path.name,
            adapter_name=lora["adapter"],
            use_safetensors=True,
            local_files_only=True,
            **second,
        )
    pipe.set_adapters([lora["adapter"] for lora, _ in recipe], [lora["weight"] for lora, _ in recipe])
    pipe.fuse_lora(components=sorted({lora["target"] for lora, _ in recipe}))
    pipe.unload_lora_weights()


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
    return other


def render(pipe: Any, model: Model, job: Job, meter: Meter) -> Iterator[Clip]:
    """Run `job` and yield its clips as they are ready, file i with the seed `job.seed + i`.

    Reports encoding, each denoising step and decoding to `meter`, from where a cancel raises Cancelled.
    """
    pipeline = model.pipelines[job.task]
    passes = seeds_of_passes(job, pipeline.batch)
    with _reported(pipe, meter):
        for number, seeds in enumerate(passes):
            meter.enter(Phase.ENCODING)  # before the run is counted on: progress must not jump ahead and stay there
            meter.begin_run(number, len(passes), job.steps)
            videos = _run(pipe, model, job, seeds, meter)
            yield from (Clip(seed, _pixels(video)) for seed, video in zip(seeds, videos, strict=True))


def seeds_of_passes(job: Job, batch: bool) -> list[list[int]]:
    """The seeds of each pass through the pipeline: `batch_size` at once where the class can, else one by one."""
    seeds = [(job.seed + i) % SEED_RANGE for i in range(job.batch_size * job.repeat_generation)]
    size = job.batch_size if batch else 1
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def _run(pipe: Any, model: Model, job: Job, seeds: list[int], meter: Meter) -> torch.Tensor:
    """One call of the pipeline: videos (B, F, C, H, W), float in 0..1."""
    if job.flow_shift is not None and "shift_param" in model.scheduler:
        shift = {model.scheduler["shift_param"]: job.flow_shift}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **shift)
    videos = pipe(**call_arguments(model, job, seeds), callback_on_step_end=_step_reporter(meter)).frames
    assert isinstance(videos, torch.Tensor)
    return videos


def _step_reporter(meter: Meter) -> Callable[..., dict[str, Any]]:
    def report(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        meter.step_done(step + 1)  # raises Cancelled: `pipe._interrupt` would still run the VAE
        return tensors

    return report


def call_arguments(model: Model, job: Job, seeds: list[int]) -> dict[str, Any]:
    """The keyword arguments of the pipeline's `__call__` for this job and these seeds."""
    pipeline = model.pipelines[job.task]
    roles = {**_plain_roles(model, job), **_picture_roles(pipeline, job)}
    # A CPU generator draws the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    roles |= {"seed": generators[0], "output_type": "pt"}
    if len(seeds) > 1:  # a list of prompts, not `num_videos_per_prompt`: that breaks classes with an image encoder
        roles |= {"seed": generators, "prompt": [job.prompt] * len(seeds)}
    named = {pipeline.call[role]: value for role, value in roles.items() if role in pipeline.call}
    return {**model.extra_call, **{name: value for name, value in named.items() if value is not None}}


def _plain_roles(model: Model, job: Job) -> dict[str, Any]:
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt if model.has_setting("negative_prompt", job.task) else None,
        "frames": job.frames,
        "steps": job.steps,
        "guidance": job.guidance_scale,
        "guidance_2": job.guidance2_scale,
        "embedded_guidance": job.embedded_guidance_scale,
        "width": job.width,
        "height": job.height,
        "shift": job.flow_shift,
    }


def _picture_roles(pipeline: Pipeline, job: Job) -> dict[str, Any]:
    """The input pictures by role; start and end picture fill the frame (cropped, never stretched)."""
    size = (job.width, job.height)
    pictures = {name: [media.open_image(path) for path in paths] for name, paths in job.images.items()}
    start, end = (_fitted(pictures.get(name), size) for name in ("image_start", "image_end"))
    known = {0: start, job.frames - 1: end}
    roles = _PICTURE_FORMS[pipeline.start_image_as](job, {at: image for at, image in known.items() if image})
    return {**roles, "reference_images": pictures.get("image_refs")}


def _fitted(pictures: list[Image.Image] | None, size: tuple[int, int]) -> Image.Image | None:
    return ImageOps.fit(pictures[0], size, Image.Resampling.LANCZOS) if pictures else None


def _as_images(job: Job, known: Mapping[int, Image.Image]) -> dict[str, Any]:
    return {"start_image": known.get(0), "end_image": known.get(job.frames - 1) if job.frames > 1 else None}


def _as_masked_video(job: Job, known: Mapping[int, Image.Image]) -> dict[str, Any]:
    if not known:
        return {}
    size = (job.width, job.height)
    grey = Image.new("RGB", size, MID_GREY)
    keep, generate = Image.new("L", size, KEEP), Image.new("L", size, GENERATE)
    return {
        "source_video": [known.get(i, grey) for i in range(job.frames)],
        "mask": [keep if i in known else generate for i in range(job.frames)],
    }


_PICTURE_FORMS: Mapping[str, Callable[[Job, Mapping[int, Image.Image]], dict[str, Any]]] = {
    "image": _as_images,
    "video_and_mask": _as_masked_video,
}


@contextmanager
def _reported(pipe: Any, meter: Meter) -> Iterator[None]:
    """Within the block, `meter` hears of every denoiser block and every VAE decoder call, and can cancel there."""
    with ExitStack() as hooks:
        for module, phase in _milestones(pipe):
            handle = module.register_forward_pre_hook(lambda *_, phase=phase: meter.enter(phase))
            hooks.callback(handle.remove)
        yield


def _milestones(pipe: Any) -> Iterator[tuple[torch.nn.Module, Phase]]:
    for name in DENOISERS:
        if (denoiser := getattr(pipe, name, None)) is not None:
            yield denoiser, Phase.DENOISING
            yield from ((block, Phase.DENOISING) for block in getattr(denoiser, "blocks", ()))
    if (decoder := getattr(getattr(pipe, "vae", None), "decoder", None)) is not None:
        yield decoder, Phase.DECODING


def _pixels(video: torch.Tensor) -> torch.Tensor:
    """(F, C, H, W) in 0..1 → (F, H, W, C) uint8 on the CPU; rounded on the device, where it is cheap."""
    return (video.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
