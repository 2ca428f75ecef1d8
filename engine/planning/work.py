"""What a job consists of: the bytes of a model, the tokens of a request, and the arithmetic that both need."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rtoml

from engine.catalog.models import Model, default_settings
from engine.job import Job
from engine.planning.windows import windows

SHAPES: Mapping[str, Mapping[str, Any]] = rtoml.load(Path(__file__).with_name("shapes.toml"))  # by family, or kind
SOUND_TOKENS_PER_S = 25
ATTENTION_WIDTH = 28  # layers x width is the parameters to the power 2/3, divided by this: within 15% for ten families


@dataclass(frozen=True)
class Shape:
    """How the sizes of a family count; bytes are those of numbers of 2 bytes."""

    pixel_step: int  # of a token, which is square; by default the model's size step, between 16 and 32
    frame_step: int  # of a token; by default the model's length step
    frame_bytes: int = 0  # that the VAE needs for a pixel of one frame, however many frames there are
    voxel_bytes: int = 0  # that the VAE needs for a pixel of each frame
    work: float = 1.0  # the share of the weights that a token passes through
    encoder_runs: int = 1  # for one prompt

    @classmethod
    def of(cls, model: Model) -> "Shape":
        """The shape of the model's family, or that of its kind."""
        rule = {"pixel_step": min(32, max(16, model.spatial_multiple)), "frame_step": model.frames.step}
        return cls(**{**rule, **SHAPES.get(model.family, SHAPES[model.kind])})


@dataclass(frozen=True)
class Parts:
    """Bytes of the weights by component, in the dtypes in which they run; all denoisers together."""

    denoisers: int
    encoders: int
    vae: int
    denoiser_count: int = 1
    parameters: int = 0  # of one denoiser
    vae_width: float = 1.0  # bytes of its numbers against bf16
    quantization: str = "none"  # of the denoisers, whose bytes are counted as they are then
    changed: bool = False  # after loading: the denoisers' weights are no longer pages of a file, which may be dropped

    @classmethod
    def of(cls, model: Model) -> "Parts":
        """By the catalogue."""
        width, vae_width = (2 if model.dtypes.get(name) == "float32" else 1 for name in ("transformer", "vae"))
        return cls(
            denoisers=model.transformer_bf16_bytes * width,
            encoders=model.encoders_bf16_bytes,
            vae=model.vae_bf16_bytes * vae_width,
            denoiser_count=model.transformer_count,
            parameters=model.transformer_bf16_bytes // (2 * model.transformer_count),
            vae_width=float(vae_width),
            changed=bool(model.recipe_loras),
        )


@dataclass(frozen=True)
class Work:
    """What one job asks for. A run is one call of the pipeline: the job, or one of its windows."""

    width: int
    height: int
    frames: int  # of a run; 0: sound
    steps: int  # of denoising, for each of the sections
    tokens: int  # of one result in one forward
    passes: int = 1  # forwards that a step takes
    joined: bool = False  # they are one forward, with everything twice
    batch: int = 1  # results of a run
    runs: int = 1
    sections: int = 1  # of a run

    @classmethod
    def of(cls, model: Model, job: Job) -> "Work":
        """What `job` asks of `model`."""
        size = job.width, job.height, job.window_frames or job.frames
        run = cls._of_run(model, job.task, size, job.steps, job.guidance_scale or 0, sound_s=job.duration_s)
        # A long video is made by itself: each of its windows continues the one before.
        batch = job.batch_size if model.pipelines[job.task].batch and not job.window_frames else 1
        runs = job.repeat_generation * job.batch_size // batch * len(windows(job, model.frames))
        return replace(run, batch=batch, runs=runs)

    @classmethod
    def usual(cls, model: Model) -> "Work":
        """What a request asks for that has only a prompt."""
        settings = default_settings(model)
        width, height = map(int, settings.get("resolution", "0x0").split("x"))
        size = width, height, settings.get("video_length", 1 if width else 0)
        steps = settings.get("num_inference_steps") or model.fixed_steps or 1
        guidance, sound_s = settings.get("guidance_scale", 0), settings.get("duration_seconds")
        return cls._of_run(model, model.tasks[0], size, steps, guidance, sound_s=sound_s)

    @classmethod
    def _of_run(
        cls, model: Model, task: str, size: tuple[int, int, int], steps: int, guidance: float, *, sound_s: float | None
    ) -> "Work":
        (width, height, frames), pipeline = size, model.pipelines[task]
        section = min(pipeline.section_frames or frames, frames)
        return cls(
            *size,
            steps=pipeline.stages * steps,
            tokens=tokens(model, width, height, section, sound_s),
            passes=1 + (guidance > 1 and pipeline.cfg_passes != "single"),
            joined=pipeline.cfg_passes.startswith("batched"),
            sections=math.ceil(frames / section) if section else 1,
        )

    @property
    def voxels(self) -> int:
        """Pixels of all frames of one run."""
        return self.width * self.height * self.frames * self.batch


def tokens(model: Model, width: int, height: int, frames: int, duration_s: float | None = None) -> int:
    """How many tokens the denoiser sees for one result: latent frames x latent size / patch, or seconds of sound."""
    if not frames:
        return math.ceil((duration_s or 60.0) * SOUND_TOKENS_PER_S)
    shape = Shape.of(model)
    rows, columns = (math.ceil(side / shape.pixel_step) for side in (height, width))
    return math.ceil(frames / shape.frame_step) * rows * columns


def forward_flops(parameters: int, token_count: int, work: float = 1.0) -> float:
    """Operations of one forward: the products with the weights, and self-attention."""
    return 2 * parameters * work * token_count + 4 * token_count**2 * math.pow(parameters, 2 / 3) / ATTENTION_WIDTH
