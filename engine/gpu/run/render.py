"""Run a Job through a loaded diffusers pipeline. How its class names its parameters is in the catalogue, not here."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import reduce
from itertools import count
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend

from engine import settings
from engine.catalog.models import Model, Pipeline
from engine.gpu.load import compiling, kernels, offloading, pipelines
from engine.gpu.run import caching, conditioning, decoding, results, sliding
from engine.gpu.run.adapters import Adapters
from engine.gpu.run.conditioning import Call
from engine.gpu.run.meter import Meter, counted_steps
from engine.gpu.run.results import Clip
from engine.job import SEED_RANGE, Job, Phase
from engine.planning.work import Work

AfterStep = Callable[[int], None]  # called after each step with the number of steps that are done
Together = Callable[[Any, Job, AfterStep], AbstractContextManager[AfterStep]]  # Team.together

CHECKS = 8  # for a cancel, within a call of a denoiser: a call takes up to a minute, and each check 0.01 ms


def render(
    pipe: Any, model: Model, job: Job, meter: Meter, *, loras: Adapters | None = None, together: Together | None = None
) -> Iterator[Clip]:
    """Run `job` and yield its clips as they are ready, file i with the seed `job.seed + i`.

    Reports its phases and steps to `meter`, which raises Cancelled. Within `together`, other devices compute too.
    """
    work, numbers, adapters = Work.of(model, job), count(), loras or Adapters()
    seeds = [(job.seed + i) % SEED_RANGE for i in range(job.batch_size * job.repeat_generation)]

    def run(call: Call) -> Iterator[Clip]:
        meter.enter(Phase.ENCODING)  # before the run is counted on: progress must not jump ahead and stay there
        meter.begin_run(next(numbers), work.runs, job.steps)
        return _run(pipe, model, call, meter, adapters, together=together)

    def make_window(call: Call) -> torch.Tensor:
        (clip,) = run(call)
        return torch.cat(list(clip.frames or ()))

    with _reported(pipe, meter, alone=together is None):
        for first in range(0, len(seeds), work.batch):
            if job.window_frames:
                yield Clip(seeds[first], sliding.video(model, job, seeds[first], make_window))
            else:
                yield from run(Call(job, seeds[first : first + work.batch]))


def _run(
    pipe: Any, model: Model, call: Call, meter: Meter, adapters: Adapters, *, together: Together | None
) -> Iterator[Clip]:
    job, pipeline = call.job, model.pipelines[call.job.task]
    with prepared(pipe, model, job, adapters) as (fitted, set_strengths):
        torch.manual_seed(call.seeds[0])  # some classes draw more than the noise, and not from their generator
        joint = together(fitted, job, set_strengths) if together else nullcontext(set_strengths)
        with joint as after_step, counted_steps(fitted, job, pipeline, meter, after_step) as callback:
            output = fitted(**_call_arguments(fitted, model, call), **callback)
    if pipeline.output_type == "latent":  # Wan's, (B, C, F, H, W); their frames are decoded as they are iterated over
        latents = zip(call.seeds, output.frames.split(1), strict=True)
        return (Clip(seed, decoding.pieces(fitted, one, job.frames)) for seed, one in latents)
    return results.clips(output, pipeline, call.seeds, _sample_rate(fitted, pipeline), job.frames)


@contextmanager
def prepared(pipe: Any, model: Model, job: Job, adapters: Adapters) -> Iterator[tuple[Any, AfterStep]]:
    """Within, the pipeline is set for `job`; yields that of its task, and what sets LoRA strengths after each step."""
    pipe = pipelines.sibling(pipe, model.pipelines[job.task])
    pipelines.adjust(pipe, model, job)
    kernel = attention_backend(model.attention_backend or kernels.NATIVE)
    with adapters.applied(pipe, job) as set_strengths, caching.cached(pipe, model, job), kernel:
        compiling.suit(pipe, job)
        yield pipe, set_strengths


def _sample_rate(pipe: Any, pipeline: Pipeline) -> int:
    """Samples a second of the sound that the pipeline makes; 0 where it makes none."""
    return int(reduce(getattr, pipeline.sample_rate.split("."), pipe)) if pipeline.sample_rate else 0


def _call_arguments(pipe: Any, model: Model, call: Call) -> dict[str, Any]:
    job, seeds, pipeline = call.job, call.seeds, model.pipelines[call.job.task]
    roles = {**_plain_roles(model, job), **conditioning.roles(pipeline, call, _sample_rate(pipe, pipeline))}
    # A CPU generator draws the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    roles |= {"seed": generators[0], "output_type": pipeline.output_type}
    if len(seeds) > 1:  # a list of prompts, not `num_videos_per_prompt`: that breaks classes with an image encoder
        roles |= {"seed": generators, "prompt": [job.prompt] * len(seeds)}
    named = {pipeline.call[role]: value for role, value in roles.items() if role in pipeline.call}
    return {
        **model.extra_call,
        **pipeline.by_task.get(job.task, {}),
        **{name: value for name, value in named.items() if value is not None},
        **{name: None for name, steps in pipeline.only_at_steps.items() if job.steps != steps},
    }


def _plain_roles(model: Model, job: Job) -> dict[str, Any]:
    pipeline = model.pipelines[job.task]
    # A mark for each reference picture in front of the prompt, where the class wants them and none are there.
    pictures = range(1, 1 + len(job.inputs.get("image_refs", ()))) if pipeline.picture_mark else ()
    marks = [mark for mark in map(pipeline.picture_mark.format, pictures) if mark not in job.prompt]
    steps = job.steps if pipeline.stages == 1 else [-(-job.steps // pipeline.stages)] * pipeline.stages
    negative = job.negative_prompt or (None if pipeline.null_negative else "")
    return {
        **settings.roles(job),
        "prompt": " ".join([*marks, job.prompt]),
        "negative_prompt": negative if model.has_setting("negative_prompt", job.task) else None,
        "frames": model.frames.told(job.frames),
        "window": min(model.window_frames, job.frames) or None,
        "fps": job.fps,
        "steps": steps if model.has_setting("num_inference_steps", job.task) else None,
        "width": job.width,
        "height": job.height,
        "area": job.width * job.height,
    }


@contextmanager
def _reported(pipe: Any, meter: Meter, *, alone: bool) -> Iterator[None]:
    """Within, each call of a denoiser or VAE decoder enters its phase, and can be cancelled; `alone`, in it too."""
    watched: dict[Phase, list[Any]] = {Phase.DENOISING: [], Phase.DECODING: []}
    for denoiser in offloading.denoisers(pipe).values():
        blocks = list(getattr(denoiser, "blocks", ())) if alone else []
        watched[Phase.DENOISING] += denoiser, *blocks[:: max(1, len(blocks) // CHECKS)]
    if (decoder := getattr(getattr(pipe, "vae", None), "decoder", None)) is not None:
        watched[Phase.DECODING].append(decoder)
    with ExitStack() as hooks:
        for phase, modules in watched.items():
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(lambda *_, phase=phase: meter.enter(phase)))
        yield
