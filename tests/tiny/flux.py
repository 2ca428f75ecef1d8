"""Tiny checkpoints of the Flux 1 and Chroma models, whose denoisers share one plan: double blocks, then single ones.

The text is 512 tokens of padding for the most part, and a picture's few tokens stand beside them: the attention has to
be sharp, and what it brings has to count.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

from tests.proof import Proof

from .image_parts import PARTLY, SHIFT_BY_SIZE, TEXT_SIZE, amplified, clip_encoder, t5_encoder, vae
from .tokenizers import characters, clip

LATENT_CHANNELS = 4
PACKED_CHANNELS = 4 * LATENT_CHANNELS  # a token is 2x2 latent pixels
MASK_CHANNELS = 4 * 64  # of Fill: a latent pixel has the mask of its 8x8 pixels

BLOCKS = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_SIZE,
}
GAINS = {"attn.to_v.weight": 5.0, "attn.add_v_proj.weight": 5.0, "attn.norm_q.weight": 4.0}


def flux(
    pipeline: type[DiffusionPipeline], *, conditions: int = 0, guided: bool = True, **schedule: Any
) -> DiffusionPipeline:
    """A Flux 1 checkpoint. `conditions` further channels go into the denoiser; `guided`: it reads a guidance."""
    tokenizer = clip()
    return pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
        vae=_vae(),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(),
        tokenizer_2=characters(),
        transformer=_denoiser(conditions, guided),
    )


def _vae() -> AutoencoderKL:
    return vae(LATENT_CHANNELS, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0)


def _denoiser(conditions: int, guided: bool) -> FluxTransformer2DModel:
    part = FluxTransformer2DModel(
        **BLOCKS,
        in_channels=PACKED_CHANNELS + conditions,
        out_channels=PACKED_CHANNELS,
        pooled_projection_dim=TEXT_SIZE,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guided,
    )
    return amplified(part, GAINS)


def chroma() -> ChromaPipeline:
    """A Chroma checkpoint: no CLIP and no guidance in the denoiser, and the padding of a text is masked."""
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SHIFT_BY_SIZE),
        vae=_vae(),
        text_encoder=t5_encoder(),
        tokenizer=characters(),
        transformer=_chroma_denoiser(),
    )


def _chroma_denoiser() -> ChromaTransformer2DModel:
    with warnings.catch_warnings():  # the class uses a name of diffusers that will move
        warnings.simplefilter("ignore", FutureWarning)
        part = ChromaTransformer2DModel(
            **BLOCKS,
            in_channels=PACKED_CHANNELS,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        )
    return amplified(part, GAINS)


dev = partial(flux, FluxPipeline, **SHIFT_BY_SIZE)
control = partial(flux, FluxControlPipeline, conditions=PACKED_CHANNELS, **SHIFT_BY_SIZE)

MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "flux_dev": dev,
    "flux_schnell": partial(flux, FluxPipeline, guided=False, shift=1.0),
    "flux_krea_dev": dev,
    "flux_kontext_dev": partial(flux, FluxKontextPipeline, **SHIFT_BY_SIZE),
    "flux_fill_dev": partial(flux, FluxFillPipeline, conditions=PACKED_CHANNELS + MASK_CHANNELS, **SHIFT_BY_SIZE),
    "flux_depth_dev": control,
    "flux_canny_dev": control,
    "chroma1_hd": chroma,
    "chroma1_base": chroma,
}
PROOFS: Mapping[str, Proof] = {
    f"{name}-i2i": PARTLY for name in ("flux_dev", "flux_schnell", "flux_krea_dev", "chroma1_hd", "chroma1_base")
}
