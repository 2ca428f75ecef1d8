"""Tiny checkpoints of CogVideoX: 1.0 and 1.5, for texts, for pictures and for control videos."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
)

from .image_parts import TEXT_SIZE, amplified, t5_encoder
from .tokenizers import characters

CHANNELS = 4  # of the latents
SCHEDULE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
DENOISER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 16,
    "text_embed_dim": TEXT_SIZE,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
}
ROTARY = {"use_rotary_positional_embeddings": True}
SECOND = {"patch_size_t": 2, "patch_bias": False, "sample_frames": 9}  # version 1.5
BESIDE = {"in_channels": 2 * CHANNELS}  # a picture or a control video goes in beside the noise
GAINS = {"patch_embed.text_proj.weight": 4.0, "attn1.to_v.weight": 2.0, "proj_out.weight": 2.0}
VAE_GAINS = {"encoder.conv_out.conv.weight": 4.0}


def _made(
    pipeline: type[DiffusionPipeline], scheduler: SchedulerMixin, vae: Mapping[str, Any], **denoiser: Any
) -> DiffusionPipeline:
    return pipeline(
        tokenizer=characters(max_length=226),
        text_encoder=t5_encoder(),
        vae=_vae(**vae),
        transformer=amplified(CogVideoXTransformer3DModel(**(DENOISER | denoiser)), GAINS),
        scheduler=scheduler,
    )


def _vae(**config: Any) -> AutoencoderKLCogVideoX:
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=2, **config
    )
    return amplified(vae, VAE_GAINS)


def _ddim() -> SchedulerMixin:
    return CogVideoXDDIMScheduler(**SCHEDULE, snr_shift_scale=3.0)


def _dpm() -> SchedulerMixin:
    return CogVideoXDPMScheduler(**SCHEDULE, snr_shift_scale=1.0)


LARGE = {"scaling_factor": 0.7}
LARGE_SECOND = {"scaling_factor": 0.7, "invert_scale_latents": True}


def _control() -> DiffusionPipeline:
    return _made(CogVideoXFunControlPipeline, DDIMScheduler(**SCHEDULE), LARGE, **ROTARY, **BESIDE)


def _text(first: bool) -> DiffusionPipeline:
    """The small model of 1.0, which has sines for positions and its own schedule, or a large one."""
    if first:
        return _made(CogVideoXPipeline, _ddim(), {})
    return _made(CogVideoXPipeline, _dpm(), LARGE, **ROTARY)


def _image() -> DiffusionPipeline:
    """Its positions are learned too, for one size alone."""
    return _made(
        CogVideoXImageToVideoPipeline, _dpm(), LARGE, **ROTARY, **BESIDE, use_learned_positional_embeddings=True
    )


def _second_text() -> DiffusionPipeline:
    return _made(CogVideoXPipeline, _dpm(), LARGE_SECOND, **ROTARY, **SECOND)


def _second_image() -> DiffusionPipeline:
    return _made(CogVideoXImageToVideoPipeline, _dpm(), LARGE_SECOND, **ROTARY, **SECOND, **BESIDE, ofs_embed_dim=16)


MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "cogvideox_2B": partial(_text, True),
    "cogvideox_5B": partial(_text, False),
    "cogvideox_i2v_5B": _image,
    "cogvideox15_5B": _second_text,
    "cogvideox15_i2v_5B": _second_image,
    "cogvideox_fun_pose_5B": _control,
}
