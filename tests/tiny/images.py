"""Tiny checkpoints of Qwen-Image, Z-Image, HiDream and Krea 2, whose texts come from language models."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3Model, Qwen3VLConfig, Qwen3VLModel

from tests.proof import Proof

from . import qwen_vl
from .image_parts import LANGUAGE, PARTLY, SHIFT_BY_SIZE, TEXT_SIZE, certain, projecting_clip_encoder, t5_encoder, vae
from .lively import lively
from .tokenizers import characters, clip, llama, qwen

LATENT_CHANNELS = 16
PACKED_CHANNELS = 4 * LATENT_CHANNELS  # a token is 2x2 latent pixels
INNER_SIZE = 32  # of the denoisers: 2 heads of 16
AXES = (4, 6, 6)  # how the rotary embedding parts a head


def _causal_vae() -> AutoencoderKLQwenImage:
    """The 8x VAE of Qwen-Image, which takes a picture for a video of one frame."""
    part = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    return certain(lively(part, encoder__conv_out=3.0, decoder__conv_out=3.0))


# ------------------------------------------------------------------------------------------------------- Qwen-Image


def qwen_image() -> QwenImagePipeline:
    """A Qwen-Image checkpoint, for words alone: it has no processor of pictures."""
    tokenizer = qwen_vl.tokenizer()
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=_causal_vae(),
        text_encoder=qwen_vl.encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=lively(
            QwenImageTransformer2DModel(
                in_channels=PACKED_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=2,
                attention_head_dim=INNER_SIZE // 2,
                num_attention_heads=2,
                joint_attention_dim=qwen_vl.TEXT_SIZE,
                axes_dims_rope=AXES,
            ),
            add_v_proj=5.0,  # the words of the pipeline's template stand between those of the prompt
        ),
    )


LORA_RANK = 4


def write_lightning(folder: Path) -> None:
    """The LoRA of the few-step recipe, in the names of its publisher and with a scale for each layer."""
    tensors = {}
    for layer in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        for block in range(2):
            name = f"transformer_blocks.{block}.attn.{layer}"
            tensors[f"{name}.lora_down.weight"] = 0.5 * torch.randn(LORA_RANK, INNER_SIZE)
            tensors[f"{name}.lora_up.weight"] = 0.5 * torch.randn(INNER_SIZE, LORA_RANK)
            tensors[f"{name}.alpha"] = torch.tensor(float(LORA_RANK))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "Qwen-Image-Lightning-8steps-V1.0.safetensors")


# ------------------------------------------------------------------------------------------------- Z-Image, Krea 2


def z_image() -> ZImagePipeline:
    """A Z-Image checkpoint."""
    tokenizer = qwen()
    config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=2, **LANGUAGE)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(LATENT_CHANNELS, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0),
        text_encoder=lively(Qwen3Model(config)),
        tokenizer=tokenizer,
        transformer=lively(
            ZImageTransformer2DModel(
                in_channels=LATENT_CHANNELS,
                dim=INNER_SIZE,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=TEXT_SIZE,
                axes_dims=list(AXES),
                axes_lens=[1024, 32, 32],
            )
        ),
    )


TAPS = (1, 2)  # layers of the encoder that the denoiser reads


def krea2(*, distilled: bool) -> Krea2Pipeline:
    """A Krea 2 checkpoint; a distilled one has a schedule of its own."""
    tokenizer = qwen()
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SHIFT_BY_SIZE),
        vae=_causal_vae(),
        text_encoder=_qwen_3_vl(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=lively(
            Krea2Transformer2DModel(
                in_channels=PACKED_CHANNELS,
                num_layers=2,
                attention_head_dim=INNER_SIZE // 2,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=32,
                timestep_embed_dim=32,
                text_hidden_dim=TEXT_SIZE,
                num_text_layers=len(TAPS),
                text_num_attention_heads=2,
                text_num_key_value_heads=2,
                text_intermediate_size=32,
                num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1,
                axes_dims_rope=AXES,
            ),
            attn__to_v=5.0,  # else a negative prompt hardly shows
        ),
        text_encoder_select_layers=TAPS,
        is_distilled=distilled,
    )


def _qwen_3_vl(tokens: int) -> Qwen3VLModel:
    """An encoder that could see, too; its last layers are the last of `TAPS`."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    sight = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT_SIZE,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = {"vocab_size": tokens, "num_hidden_layers": max(TAPS), "rope_parameters": rope, **LANGUAGE}
    return lively(Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=sight)))


# ---------------------------------------------------------------------------------------------------------- HiDream


def hidream(shift: float) -> HiDreamImagePipeline:
    """A HiDream checkpoint with four encoders; each block reads a layer of the Llama of its own."""
    tokenizer, language = clip(max_length=248), llama()
    config = LlamaConfig(vocab_size=len(language), num_hidden_layers=2, pad_token_id=language.pad_token_id, **LANGUAGE)
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(LATENT_CHANNELS, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0),
        text_encoder=projecting_clip_encoder(tokenizer, max_position_embeddings=248),
        tokenizer=tokenizer,
        text_encoder_2=projecting_clip_encoder(tokenizer, max_position_embeddings=248),
        tokenizer_2=clip(max_length=248),
        text_encoder_3=t5_encoder(),
        tokenizer_3=characters(),
        text_encoder_4=lively(LlamaForCausalLM(config)),
        tokenizer_4=language,
        transformer=lively(
            HiDreamImageTransformer2DModel(
                patch_size=2,
                in_channels=LATENT_CHANNELS,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=INNER_SIZE // 2,
                num_attention_heads=2,
                caption_channels=[TEXT_SIZE, TEXT_SIZE],
                text_emb_dim=2 * TEXT_SIZE,
                num_routed_experts=2,
                num_activated_experts=1,
                axes_dims_rope=AXES,
                max_resolution=(16, 16),
                llama_layers=[0, 1],
            )
        ),
    )


MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "qwen_image_20B": qwen_image,
    "qwen_image_2512_20B": qwen_image,
    "qwen_image_lightning_20B": qwen_image,
    "z_image_turbo_6B": z_image,
    "z_image_6B": z_image,
    "krea2_raw": partial(krea2, distilled=False),
    "krea2_turbo": partial(krea2, distilled=True),
    "hidream_i1_full": partial(hidream, shift=3.0),
    "hidream_i1_dev": partial(hidream, shift=6.0),
    "hidream_i1_fast": partial(hidream, shift=3.0),
}
LORAS: Mapping[str, Callable[[Path], None]] = {"qwen_image_lightning_20B": write_lightning}
PROOFS: Mapping[str, Proof] = {
    f"{name}-i2i": PARTLY for name in ("qwen_image_20B", "qwen_image_2512_20B", "z_image_turbo_6B", "z_image_6B")
}
