"""Step caches: denoising steps that follow from those before are skipped, as many as `skip_steps_multiplier` says."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

from engine.catalog.models import Model
from engine.job import Job
from engine.planning import calibration

# Wanted speed → relative change of the first block's output below which the other blocks are skipped.
FIRST_BLOCK_THRESHOLDS: Mapping[float, float] = {1.5: 0.06, 1.75: 0.08, 2.0: 0.12, 2.25: 0.16, 2.5: 0.2}
# diffusers matches patterns against whole names, and its own do not include the number of `attn1` and `attn2`.
TAYLOR_MODULES = [r"(transformer_)?blocks\.\d+\.(attn\d?|ffn|ff)", r"single_transformer_blocks\.\d+\.attn"]
TRAIN_TIMESTEPS = 1000
TAYLOR_WARM_STEPS = 3  # a tangent needs two points, and the first steps change too much
COMPUTE, SKIP, BETWEEN = 2.0, 1.0, 0.5  # magnitude ratios whose errors, 1 and 0, are above and below a threshold


@contextmanager
def cached(pipe: Any, model: Model, job: Job) -> Iterator[None]:
    """Within the block, the denoisers of `pipe` skip steps as the job asks; afterwards they are as before."""
    with ExitStack() as enabled:
        for denoiser, timesteps in _shares(pipe, model, job) if job.skip_steps_cache_type else ():
            if len(timesteps):
                denoiser.enable_cache(_CONFIGS[job.skip_steps_cache_type](denoiser, timesteps, model, job))
                enabled.callback(denoiser.disable_cache)
                enabled.callback(denoiser._reset_stateful_cache)  # first; the pipeline does not after an exception
        yield


def _shares(pipe: Any, model: Model, job: Job) -> list[tuple[Any, torch.Tensor]]:
    if model.boundary_ratio is None and job.skip_steps_cache_type != "tea":
        return [(pipe.transformer, torch.arange(job.steps, 0, -1))]  # only their number counts
    pipe.scheduler.set_timesteps(job.steps)
    timesteps = pipe.scheduler.timesteps
    if model.boundary_ratio is None:
        return [(pipe.transformer, timesteps)]
    early = timesteps >= model.boundary_ratio * TRAIN_TIMESTEPS
    return [(pipe.transformer, timesteps[early]), (pipe.transformer_2, timesteps[~early])]


def _warm_steps(steps: int, job: Job) -> int:
    return max(1, round(steps * job.skip_steps_start_step_perc / 100))


def _mag(_: Any, timesteps: torch.Tensor, model: Model, job: Job) -> MagCacheConfig:
    steps, warm = len(timesteps), _warm_steps(len(timesteps), job)
    whole = calibration.ratios(model.mag_calibration, job.steps)
    ends_run = timesteps[0] < (model.boundary_ratio or 0) * TRAIN_TIMESTEPS  # as the low-noise expert does
    ratios = whole[-steps:] if ends_run else whole[:steps]
    schedule = partial(calibration.mag_schedule, ratios, warm_steps=warm)
    threshold = calibration.threshold_for(job.skip_steps_multiplier, schedule)
    return MagCacheConfig(threshold, calibration.MAX_SKIPS, warm / steps, steps, ratios)


def _first_block(_d: Any, _t: torch.Tensor, _m: Model, job: Job) -> FirstBlockCacheConfig:
    nearest = min(FIRST_BLOCK_THRESHOLDS, key=lambda multiplier: abs(multiplier - job.skip_steps_multiplier))
    return FirstBlockCacheConfig(threshold=FIRST_BLOCK_THRESHOLDS[nearest])


def _taylor(denoiser: Any, timesteps: torch.Tensor, _: Model, job: Job) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        cache_interval=max(2, round(job.skip_steps_multiplier)),
        disable_cache_before_step=max(TAYLOR_WARM_STEPS, _warm_steps(len(timesteps), job)),
        cache_identifiers=TAYLOR_MODULES,
        taylor_factors_dtype=denoiser.dtype,
    )


def _tea(denoiser: Any, timesteps: torch.Tensor, model: Model, job: Job) -> MagCacheConfig:
    """TeaCache (arXiv:2411.19108): the steps where the time embedding has hardly changed are skipped."""
    # The embedding depends on the timestep alone, so the steps to compute are known before the run.
    coefficients = calibration.CONSTANTS["teacache"][model.tea_calibration]["coefficients"]
    changes = embedding_changes(denoiser, timesteps.to(denoiser.device))
    steps, warm = len(timesteps), _warm_steps(len(timesteps), job)
    schedule = partial(calibration.tea_schedule, coefficients, changes, warm_steps=warm)
    computed = schedule(calibration.threshold_for(job.skip_steps_multiplier, schedule))
    ratios = [COMPUTE if compute else SKIP for compute in computed]  # with which MagCache computes exactly those
    return MagCacheConfig(BETWEEN, steps, retention_ratio=0.0, num_inference_steps=steps, mag_ratios=ratios)


@torch.no_grad()
def embedding_changes(denoiser: Any, timesteps: torch.Tensor) -> list[float]:
    """The relative L1 change of the time embedding of a Wan denoiser from each timestep to the next."""
    embedder = denoiser.condition_embedder
    dtype = next(embedder.time_embedder.parameters()).dtype
    embedded = embedder.time_embedder(embedder.timesteps_proj(timesteps.float()).to(dtype)).float()  # (steps, D)
    changes: list[float] = (embedded.diff(dim=0).abs().mean(1) / embedded[:-1].abs().mean(1)).tolist()
    return changes


_CONFIGS: Mapping[str, Callable[[Any, torch.Tensor, Model, Job], Any]] = {
    "mag": _mag,
    "tea": _tea,
    "fbc": _first_block,
    "taylorseer": _taylor,
}
