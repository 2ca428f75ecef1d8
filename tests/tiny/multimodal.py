"""Tiny checkpoints of OmniGen and GLM-Image, in which a language model reads the pictures."""

from collections.abc import Callable, Mapping

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
)
from transformers import (
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessor,
    GlmImageProcessor,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)

from . import image_parts, tokenizers
from .lively import lively

# ---------------------------------------------------------------------------------------------------------- OmniGen

HEAD_SIZE = 12


def _omnigen() -> DiffusionPipeline:
    """One transformer reads the words, the pictures and the noise."""
    tokenizer = tokenizers.llama(max_length=8192)
    denoiser = OmniGenTransformer2DModel(
        hidden_size=2 * HEAD_SIZE,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        rope_scaling={"short_factor": [1.0] * (HEAD_SIZE // 2), "long_factor": [1.0] * (HEAD_SIZE // 2)},
        time_step_dim=32,
    )
    return OmniGenPipeline(
        transformer=lively(denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        vae=image_parts.vae(latent_channels=4),
        tokenizer=tokenizer,
    )


# -------------------------------------------------------------------------------------------------------- GLM-Image

CODES = [f"<|dit_token_{number}|>" for number in range(64)]  # of picture tokens: the vocabulary begins with them
BEGIN, END = "<|dit_token_64|>", "<|dit_token_65|>"  # of a picture
GLM_MARKS = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
GLM_TEMPLATE = """\
[gMASK]{% for message in messages %}<|{{ message.role }}|>
{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"""


def _glm_tokenizer() -> Qwen2Tokenizer:
    """A token a byte after those of pictures, with the marks of the size of the picture that is asked for."""
    pieces = [*CODES, BEGIN, END, *tokenizers.qwen().get_vocab()]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[],
        bos_token=BEGIN,
        pad_token="<|endoftext|>",
        extra_special_tokens=GLM_MARKS,
    )
    tokenizer.chat_template = GLM_TEMPLATE
    return tokenizer


def _glm_prior(tokenizer: Qwen2Tokenizer) -> GlmImageForConditionalGeneration:
    """It writes a picture as tokens of 32x32 pixels, one after the other, and never stops early."""
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "vision_vocab_size": len(CODES) + 2,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 16,
            "image_size": 64,
        },
        vq_config={"embed_dim": 8, "num_embeddings": len(CODES), "latent_channels": 24},
        image_token_id=tokenizer.convert_tokens_to_ids(GLM_MARKS["image_token"]),
        image_start_token_id=len(CODES),
        image_end_token_id=len(CODES) + 1,
    )
    return lively(
        GlmImageForConditionalGeneration(config), v_proj=8.0, lm_head=4.0
    )  # else it draws the same for any prompt


def _glm() -> DiffusionPipeline:
    tokenizer = _glm_tokenizer()
    glyphs = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0)
    denoiser = GlmImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=len(CODES) + 2,
    )
    vae = AutoencoderKL(
        latent_channels=16,
        **image_parts.VAE_STAGES,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    return GlmImagePipeline(
        tokenizer=tokenizers.byte(),
        processor=GlmImageProcessor(
            GlmImageImageProcessor(
                patch_size=16,
                merge_size=1,
                temporal_patch_size=1,
                size={"shortest_edge": 512**2, "longest_edge": 2048**2},
            ),
            tokenizer,
            chat_template=GLM_TEMPLATE,
        ),
        text_encoder=T5EncoderModel(glyphs).eval(),
        vision_language_encoder=_glm_prior(tokenizer),
        vae=lively(vae),
        transformer=lively(denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
    )


MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {"omnigen_v1": _omnigen, "glm_image": _glm}
