"""Tiny checkpoints of the Qwen-Image models that read pictures.

Most of them make a picture of a million pixels of whatever they are given: so the denoisers have one block here, and
the VAEs hardly any channels.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.proof import Proof

from . import qwen_vl
from .lively import lively

CHANNELS = 16  # of the latents
WIDTH = 4  # of the VAEs
DENOISER = {
    "patch_size": 2,
    "in_channels": 4 * CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 1,
    "attention_head_dim": 12,
    "num_attention_heads": 1,
    "joint_attention_dim": qwen_vl.TEXT_SIZE,
    "axes_dims_rope": (4, 4, 4),
}


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Its shift grows with the size of the picture."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def _vae(colours: int = 3) -> AutoencoderKLQwenImage:
    """A stage deeper than the published one: a quarter of the tokens. With transparency there are 4 colours."""
    vae = AutoencoderKLQwenImage(
        base_dim=WIDTH,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True, False],
        input_channels=colours,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    return lively(vae, decoder__conv_out=6.0)


def _editor(pipeline: type[DiffusionPipeline], colours: int = 3, **denoiser: Any) -> DiffusionPipeline:
    processor = qwen_vl.processor()
    return pipeline(
        scheduler=_scheduler(),
        vae=_vae(colours),
        text_encoder=qwen_vl.encoder(processor.tokenizer),
        tokenizer=processor.tokenizer,
        processor=processor,
        # A prompt has to be heard among the thousand tokens of a picture.
        transformer=lively(QwenImageTransformer2DModel(**DENOISER | denoiser), add_v_proj=60.0),
    )


# ---------------------------------------------------------------------------------------------------- Qwen-Image 2.1

PATCH = 16  # pixels; the text encoder has a token for 2x2 of them, and so has the denoiser, which takes its place


def _processor_21() -> Qwen3VLProcessor:
    """It must not make pictures smaller: the denoiser counts on a token for each 32x32 pixels."""
    text = qwen_vl.tokenizer()
    sizes = {"shortest_edge": 256**2, "longest_edge": 4096**2}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=PATCH, size=sizes),
        text,
        Qwen3VLVideoProcessor(size=sizes),
        chat_template=text.chat_template,
    )


def _encoder_21(text: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    mark = text.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(text),
            "hidden_size": qwen_vl.TEXT_SIZE,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "patch_size": PATCH,
            "out_hidden_size": qwen_vl.TEXT_SIZE,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=mark("<|image_pad|>"),
        video_token_id=mark("<|video_pad|>"),
        vision_start_token_id=mark("<|vision_start|>"),
        vision_end_token_id=mark("<|vision_end|>"),
    )
    return lively(Qwen3VLForConditionalGeneration(config))


def _qwen_21() -> DiffusionPipeline:
    processor = _processor_21()
    vae = AutoencoderKLQwenImage21(
        base_dim=WIDTH,
        decoder_base_dim=WIDTH,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    denoiser = QwenImage21Transformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        context_in_dim=qwen_vl.TEXT_SIZE,
        axes_dims_rope=(4, 4, 4),
    )
    return QwenImage21Pipeline(
        scheduler=_scheduler(),
        vae=lively(vae),
        text_encoder=_encoder_21(processor.tokenizer),
        processor=processor,
        transformer=lively(denoiser),
    )


_edit_plus = partial(_editor, QwenImageEditPlusPipeline)

MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "qwen_image_edit_20B": partial(_editor, QwenImageEditPipeline),
    "qwen_image_edit_plus_20B": _edit_plus,
    "qwen_image_edit_plus2_20B": partial(_edit_plus, zero_cond_t=True),
    "qwen_image_layered_20B": partial(
        _editor, QwenImageLayeredPipeline, colours=4, use_additional_t_cond=True, use_layer3d_rope=True
    ),
    "qwen_image_2_1_7B": _qwen_21,
}
PROOFS: Mapping[str, Proof] = {
    "qwen_image_edit_20B-i2i": Proof(steps=2),
    "qwen_image_edit_20B-inpaint": Proof(side=1024, steps=4),
    "qwen_image_edit_plus_20B": Proof(steps=2),
    "qwen_image_edit_plus2_20B": Proof(steps=2),
    "qwen_image_layered_20B": Proof(side=640, steps=2),
}
