"""Tiny checkpoints of Kandinsky 5 and 6."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    PiflowScheduler,
)
from diffusers.pipelines.kandinsky6 import pipeline_kandinsky6_ti2va

from tests.proof import Proof

from . import image_parts, qwen_vl, tokenizers
from .lively import lively

CHANNELS = 16  # of the latents
DENOISER = {
    "in_visual_dim": CHANNELS,
    "out_visual_dim": CHANNELS,
    "in_text_dim": qwen_vl.TEXT_SIZE,
    "in_text_dim2": image_parts.TEXT_SIZE,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}
# The models of ten seconds attend to some blocks of 64 tokens only, and of those to the likeliest.
SPARSE = {
    "attention_type": "nabla",
    "attention_causal": False,
    "attention_local": False,
    "attention_glob": False,
    "attention_window": 3,
    "attention_P": 0.9,
    "attention_wT": 11,
    "attention_wW": 3,
    "attention_wH": 3,
    "attention_add_sta": True,
    "attention_method": "topcdf",
}


def _video_vae() -> AutoencoderKLHunyuanVideo:
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return lively(vae, encoder__conv_out__conv=4.0)


def _picture_vae() -> AutoencoderKL:
    """Without attention, which would cost seconds: these models make pictures of a million pixels only."""
    vae = AutoencoderKL(
        latent_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    return lively(vae)


def _texts(template: str) -> dict[str, Any]:
    """Both text encoders and their tokenizers."""
    processor, clip = qwen_vl.processor(template), tokenizers.clip()
    return {
        "text_encoder": qwen_vl.encoder(processor.tokenizer),
        "tokenizer": processor,
        "text_encoder_2": image_parts.clip_encoder(clip),
        "tokenizer_2": clip,
    }


def _kandinsky_5(pipeline: type[DiffusionPipeline], shift: float = 1.0, **denoiser: Any) -> DiffusionPipeline:
    pictures = pipeline in (Kandinsky5T2IPipeline, Kandinsky5I2IPipeline)
    return pipeline(
        transformer=lively(Kandinsky5Transformer3DModel(**DENOISER | denoiser)),
        vae=_picture_vae() if pictures else _video_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        **_texts(_template(pipeline)),
    )


def _template(pipeline: type[DiffusionPipeline]) -> str:
    """The text around a prompt, which the class sets in its constructor."""
    nothing = dict.fromkeys(("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    template: str = pipeline(**nothing, scheduler=None).prompt_template
    return template


def _kandinsky_6() -> DiffusionPipeline:
    """The distilled one: its scheduler wants several predictions of each latent at once."""
    scheduler = PiflowScheduler(num_policy_substeps=16)
    denoiser = Kandinsky6Transformer3DModel(
        **DENOISER
        | {"out_visual_dim": CHANNELS * scheduler.config.n_grid, "out_audio_dim": 20 * scheduler.config.n_grid},
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )
    audio_vae = MMAudioVAE(hidden_channels=8, latent_channels=20, mel_bins=16, layers_per_block=1)
    vocoder = MMAudioVocoder(
        num_mels=16, upsample_initial_channel=64, resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1,),)
    )
    return Kandinsky6TI2VAPipeline(
        transformer=lively(
            denoiser, video_dec_block__self_attention__to_value=24.0
        ),  # carries the picture to the video
        vae=_video_vae(),
        scheduler=scheduler,
        audio_vae=lively(audio_vae),
        vocoder=lively(vocoder),
        **_texts(pipeline_kandinsky6_ti2va._PROMPT_TEMPLATE),
    )


# 4,000 tokens: one head and one block make it a matter of a second.
_FRUGAL = {"model_dim": 12, "num_visual_blocks": 1}
_video = partial(_kandinsky_5, Kandinsky5T2VPipeline, shift=10.0, visual_cond=True)
_long_video = partial(_video, **SPARSE)
_animation = partial(_kandinsky_5, Kandinsky5I2VPipeline, shift=10.0, visual_cond=True)

MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "k5_lite_t2v": _video,
    "k5_lite_t2v_10s": _long_video,
    "k5_lite_t2v_nocfg": _video,
    "k5_lite_t2v_distil": _video,
    "k5_lite_t2v_10s_distil": _long_video,
    "k5_lite_i2v": _animation,
    "k5_pro_t2v": _video,
    "k5_pro_i2v": _animation,
    "k5_lite_t2i": partial(_kandinsky_5, Kandinsky5T2IPipeline, **_FRUGAL),
    "k5_lite_i2i": partial(_kandinsky_5, Kandinsky5I2IPipeline, **_FRUGAL, visual_cond=True),
    "k6_pro_distill": _kandinsky_6,
}
PROOFS: Mapping[str, Proof] = {
    "k5_lite_t2v_10s": Proof(side=128),
    "k5_lite_t2v_10s_distil": Proof(side=128),
    "k5_lite_t2i": Proof(side=1024, steps=3),
    "k5_lite_i2i": Proof(side=1024, steps=3),
}
