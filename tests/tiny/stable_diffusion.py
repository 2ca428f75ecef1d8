"""Tiny checkpoints of Stable Diffusion 1.5, XL and 3, each with the encoders and the schedule of its published one."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from diffusers import (
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

from tests.proof import Proof

from .image_parts import PARTLY, TEXT_SIZE, amplified, clip_encoder, projecting_clip_encoder, t5_encoder, vae
from .tokenizers import characters, clip

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 2,
}
UNET_GAINS = {"attn2.to_v.weight": 5.0, "attn2.to_out.0.weight": 5.0}
SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def sd15() -> StableDiffusionPipeline:
    """The checkpoint with a safety checker. Fresh from its constructor, that one finds nothing unsafe."""
    tokenizer = clip()
    return StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=amplified(UNet2DConditionModel(**UNET, cross_attention_dim=TEXT_SIZE), UNET_GAINS),
        scheduler=PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=StableDiffusionSafetyChecker(CLIPConfig(vision_config=SIGHT, projection_dim=16)).eval(),
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )


def sdxl(scheduler: type[SchedulerMixin], **spacing: Any) -> StableDiffusionXLPipeline:
    """An XL checkpoint: two encoders side by side, and the picture's size as a condition."""
    tokenizer = clip()
    return StableDiffusionXLPipeline(
        vae=vae(4, force_upcast=True),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=projecting_clip_encoder(tokenizer),
        tokenizer_2=clip(),
        unet=amplified(
            UNet2DConditionModel(
                **UNET,
                cross_attention_dim=2 * TEXT_SIZE,
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + TEXT_SIZE,
            ),
            UNET_GAINS,
        ),
        scheduler=_schedule(scheduler, **spacing),
    )


def _schedule(cls: type[SchedulerMixin], **spacing: Any) -> SchedulerMixin:
    with warnings.catch_warnings():  # older schedulers make arrays of tensors in a way that NumPy will give up
        warnings.simplefilter("ignore", DeprecationWarning)
        return cls(**NOISE, **spacing)


def sd3(**denoiser: Any) -> StableDiffusion3Pipeline:
    """A checkpoint of Stable Diffusion 3, whose T5 is as wide as both CLIPs together."""
    tokenizer = clip()
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0),
        text_encoder=projecting_clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=projecting_clip_encoder(tokenizer),
        tokenizer_2=clip(),
        text_encoder_3=t5_encoder(2 * TEXT_SIZE),
        tokenizer_3=characters(),
        transformer=amplified(
            SD3Transformer2DModel(
                sample_size=8,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=2 * TEXT_SIZE,
                caption_projection_dim=2 * 16,
                pooled_projection_dim=2 * TEXT_SIZE,
                pos_embed_max_size=16,
                **denoiser,
            ),
            {"proj_out.weight": 4.0},
        ),
    )


large = partial(sd3, qk_norm="rms_norm")

MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "sd15": sd15,
    "sdxl_base": partial(sdxl, EulerDiscreteScheduler, timestep_spacing="leading"),
    "sdxl_turbo": partial(sdxl, EulerAncestralDiscreteScheduler, timestep_spacing="trailing"),
    "sd35_large": large,
    "sd35_large_turbo": large,
    "sd35_medium": partial(sd3, qk_norm="rms_norm", dual_attention_layers=(0,)),
    "sd3_medium": sd3,
}
# At two size steps, 16 pixels, a U-Net would have a single pixel in its middle.
PROOFS: Mapping[str, Proof] = {
    **dict.fromkeys(("sd15", "sdxl_base", "sdxl_turbo"), Proof(side=32)),
    **{f"{name}-i2i": replace(PARTLY, side=32) for name in MODELS},
}
