"""Tiny checkpoints of Sana: pictures, pictures in two steps (Sprint) and videos."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKLLTX2Video,
    AutoencoderKLWan,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SCMScheduler,
)
from torch import nn
from transformers import Gemma2Config, Gemma2Model

from tests.proof import Proof

from .image_parts import TEXT_SIZE
from .lively import lively
from .tokenizers import gemma

PICTURE_CHANNELS = 4
SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "timestep_scale": 1000.0}
VIDEO_CHANNELS = {"wan": 16, "ltx2": 8}
VIDEO_PATCH = {"wan": (1, 2, 2), "ltx2": (1, 1, 1)}


def _texts() -> dict[str, Any]:
    tokenizer = gemma()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_SIZE,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        initializer_range=0.2,
    )
    return {"tokenizer": tokenizer, "text_encoder": Gemma2Model(config).eval()}


def _flow(shift: float) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def _picture() -> DiffusionPipeline:
    return SanaPipeline(**_texts(), vae=_deep_vae(), transformer=_painter(), scheduler=_flow(3.0))


def _sprint() -> DiffusionPipeline:
    """Guidance is an input of its denoiser, and its schedule is one of angles."""
    return SanaSprintPipeline(**_texts(), vae=_deep_vae(), transformer=_painter(**SPRINT), scheduler=SCMScheduler())


def _painter(**config: Any) -> nn.Module:
    model = SanaTransformer2DModel(
        in_channels=PICTURE_CHANNELS,
        out_channels=PICTURE_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT_SIZE,
        **config,
    )
    return lively(model)


def _deep_vae() -> nn.Module:
    """The 32x VAE, without the attention of the published one."""
    widths = (8,) * 6
    vae = AutoencoderDC(
        latent_channels=PICTURE_CHANNELS,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
    )
    return vae.eval()


def _video(vae: str, shift: float, side: int) -> DiffusionPipeline:
    transformer = SanaVideoTransformer3DModel(
        in_channels=VIDEO_CHANNELS[vae],
        out_channels=VIDEO_CHANNELS[vae],
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT_SIZE,
        sample_size=side,
        patch_size=VIDEO_PATCH[vae],
    )
    return SanaVideoPipeline(**_texts(), vae=VIDEO_VAES[vae](), transformer=lively(transformer), scheduler=_flow(shift))


def wan_vae() -> AutoencoderKLWan:
    """The 8x VAE of Wan 2.1, which others have taken over."""
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    return lively(vae)


def _ltx2_vae() -> nn.Module:
    vae = AutoencoderKLLTX2Video(
        latent_channels=VIDEO_CHANNELS["ltx2"],
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    return lively(vae)


VIDEO_VAES: Mapping[str, Callable[[], nn.Module]] = {"wan": wan_vae, "ltx2": _ltx2_vae}

MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "sana_1600M": _picture,
    "sana_600M": _picture,
    "sana_sprint_1600M": _sprint,
    "sana_video_2B": partial(_video, "wan", 8.0, 30),
    "sana_video_720p_2B": partial(_video, "ltx2", 8.0, 22),
}

PROOFS: Mapping[str, Proof] = {
    # At four steps, a strength of 0.75 and more leaves nothing of the picture.
    "sana_sprint_1600M-i2i": Proof(settings={"denoising_strength": 0.6})
}
