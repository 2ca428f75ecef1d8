"""Tiny checkpoints of the picture models that stand alone in their family: each has a denoiser class of its own."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaModuleConfig,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from tests.proof import Proof

from . import image_parts, qwen_vl
from .image_parts import TEXT_SIZE
from .lively import lively
from .tokenizers import PRINTABLE, byte, characters, gemma, llama, qwen

# Text encoders: of the T5 kind, and of the kind that is the first layers of a language model.
T5 = {"d_model": TEXT_SIZE, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
LANGUAGE_MODEL = {
    "hidden_size": TEXT_SIZE,
    "intermediate_size": 32,
    "num_hidden_layers": 3,  # the last but one, which some pipelines read, then knows the whole text
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}  # of the denoisers
DOUBLE_AND_SINGLE = {**HEADS, "num_layers": 1, "num_single_layers": 1}  # blocks with two streams, and with one

VAE_4 = {"latent_channels": 4, "scaling_factor": 0.13025}
VAE_16 = {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SIX_STAGES = {
    "block_out_channels": (image_parts.VAE_WIDTH,) * 6,
    "down_block_types": ("DownEncoderBlock2D",) * 6,
    "up_block_types": ("UpDecoderBlock2D",) * 6,
}

# Layer's name ends in -> factor: how the prompt comes to count beside the noise where a long template surrounds it.
JOINT_GAINS = {"norm_q": 3.0, "norm_k": 2.0, "norm_added_k": 3.0, "to_v": 4.0, "add_v_proj": 8.0}


def _vae(**config: Any) -> AutoencoderKL:
    return lively(image_parts.vae(**config), decoder__conv_out=0.5, encoder__conv_out=8.0)


def _flux_2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4)
    return lively(vae, decoder__conv_out=0.5)


def _plain_tokenizer() -> PreTrainedTokenizerFast:
    """One id per printable ASCII character, in the class that belongs to no model; GLM's marks begin a text."""
    pieces = ["<|endoftext|>", "[gMASK]", "<sop>", "<unk>", " ", *PRINTABLE]
    inner = Tokenizer(WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split("", "isolated")
    inner.post_processor = TemplateProcessing("[gMASK] <sop> $A", special_tokens=[("[gMASK]", 1), ("<sop>", 2)])
    marks = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=1024, padding_side="left", **marks)


def pixart_sigma() -> DiffusionPipeline:
    """Its sizes are those around 256 x 256, not around 1024 x 1024."""
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT_SIZE,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=characters(),
        text_encoder=lively(image_parts.t5_encoder()),
        vae=_vae(**VAE_4),
        transformer=lively(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )


def lumina2() -> DiffusionPipeline:
    tokenizer = gemma()
    transformer = Lumina2Transformer2DModel(
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=TEXT_SIZE,
    )
    return Lumina2Pipeline(
        transformer=lively(transformer, norm_q=3.0, norm_k=3.0, norm_out__linear_2=4.0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_vae(**VAE_16),
        text_encoder=lively(Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **LANGUAGE_MODEL))),
        tokenizer=tokenizer,
    )


def auraflow() -> DiffusionPipeline:
    tokenizer = llama()
    transformer = AuraFlowTransformer2DModel(
        **HEADS,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=TEXT_SIZE,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=lively(UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **T5))),
        vae=_vae(**VAE_4),
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def ovis_image() -> DiffusionPipeline:
    tokenizer = qwen()
    transformer = OvisImageTransformer2DModel(
        **DOUBLE_AND_SINGLE, joint_attention_dim=TEXT_SIZE, axes_dims_rope=(4, 6, 6)
    )
    return OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(**VAE_16),
        text_encoder=lively(Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **LANGUAGE_MODEL))),
        tokenizer=tokenizer,
        transformer=lively(transformer, **JOINT_GAINS),
    )


def prx() -> DiffusionPipeline:
    """Its sizes are those around 256 x 256, not around 512 x 512."""
    tokenizer = gemma(256)
    transformer = PRXTransformer2DModel(context_in_dim=TEXT_SIZE, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8])
    half = T5GemmaModuleConfig(vocab_size=len(tokenizer), **LANGUAGE_MODEL)
    both = T5GemmaConfig(encoder=half, decoder=half, is_encoder_decoder=False)
    encoder = T5GemmaEncoder(both.encoder)
    encoder.config = both  # the published files hold one half, and the configuration of both
    return PRXPipeline(
        transformer=lively(transformer, norm_q=3.0, norm_added_k=3.0, txt_kv_proj=2.0, final_layer__linear=4.0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=lively(encoder),
        tokenizer=tokenizer,
        vae=_vae(**VAE_16),
        default_sample_size=256,
    )


def cogview4() -> DiffusionPipeline:
    tokenizer = _plain_tokenizer()
    sizes = {"text_embed_dim": TEXT_SIZE, "time_embed_dim": 16, "condition_dim": 8, "rope_axes_dim": (16, 16)}
    config = GlmConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **LANGUAGE_MODEL)
    shift = {"base_shift": 0.25, "max_shift": 0.75, "use_dynamic_shifting": True, "time_shift_type": "linear"}
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=lively(GlmModel(config)),
        vae=_vae(**VAE_16),
        transformer=lively(CogView4Transformer2DModel(num_layers=2, **HEADS, **sizes)),
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
    )


def hunyuan_image(distilled: bool) -> DiffusionPipeline:
    """The distilled one gets its guidance as an input, and each step knows where the next one begins."""
    tokenizer, texts = qwen(), {"text_embed_dim": TEXT_SIZE, "text_embed_2_dim": TEXT_SIZE}
    transformer = HunyuanImageTransformer2DModel(
        **DOUBLE_AND_SINGLE,
        **texts,
        in_channels=16,
        out_channels=16,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        guidance_embeds=distilled,
        use_meanflow=distilled,
        rope_axes_dim=(8, 8),
    )
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0 if distilled else 5.0),
        vae=_hunyuan_vae(),
        text_encoder=qwen_vl.encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=lively(T5EncoderModel(T5Config(vocab_size=384, **T5))),
        tokenizer_2=byte(),
        transformer=lively(transformer, norm_q=2.0, norm_added_k=2.0, add_v_proj=4.0),
        **({} if distilled else _hunyuan_guiders()),
    )


def _hunyuan_vae() -> AutoencoderKLHunyuanImage:
    stages = {"block_out_channels": (32,) * 6, "layers_per_block": 1, "spatial_compression_ratio": 32}
    pictures = {"in_channels": 3, "out_channels": 3, "sample_size": 64}
    return lively(AutoencoderKLHunyuanImage(latent_channels=16, scaling_factor=0.75289, **stages, **pictures))


def _hunyuan_guiders() -> dict[str, AdaptiveProjectedMixGuidance]:
    starts = {"guider": 5, "ocr_guider": 38}  # steps
    return {
        name: AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=at) for name, at in starts.items()
    }


def longcat(pipeline: type[DiffusionPipeline], **vae: Any) -> DiffusionPipeline:
    processor = qwen_vl.processor()
    texts = {"joint_attention_dim": TEXT_SIZE, "pooled_projection_dim": TEXT_SIZE}
    transformer = LongCatImageTransformer2DModel(**DOUBLE_AND_SINGLE, **texts, axes_dims_rope=[4, 6, 6])
    return pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(**VAE_16, **vae),
        text_encoder=qwen_vl.encoder(processor.tokenizer),
        tokenizer=processor.tokenizer,
        text_processor=processor,
        transformer=lively(transformer, **JOINT_GAINS),
    )


PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 8,
    "image_size": 28,
}


def ernie_image() -> DiffusionPipeline:
    """It has no language model that would rewrite prompts: that part is optional, and wangpd does not use it."""
    tokenizer = _plain_tokenizer()
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        text_in_dim=TEXT_SIZE,
        rope_axes_dim=(4, 6, 6),
    )
    text = {"model_type": "ministral3", "vocab_size": len(tokenizer), **LANGUAGE_MODEL}
    return ErnieImagePipeline(
        transformer=lively(transformer),
        vae=_flux_2_vae(),
        text_encoder=lively(Mistral3Model(Mistral3Config(text_config=text, vision_config=PIXTRAL))),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


NARROW = 16  # channels of Ideogram's text encoder: the pipeline reads 13 of its 36 layers, over 2048 tokens
QWEN3_VL_TEXT = {
    "hidden_size": NARROW,
    "intermediate_size": NARROW,
    "num_hidden_layers": 36,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 5e6},
}
QWEN3_VL_VISION = {
    "depth": 1,
    "hidden_size": NARROW,
    "intermediate_size": NARROW,
    "num_heads": 2,
    "out_hidden_size": NARROW,
    "deepstack_visual_indexes": [0],
}


def ideogram() -> DiffusionPipeline:
    tokenizer = qwen()
    text = {**QWEN3_VL_TEXT, "vocab_size": len(tokenizer)}
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_flux_2_vae(),
        text_encoder=lively(Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=QWEN3_VL_VISION))),
        tokenizer=tokenizer,
        transformer=_ideogram_denoiser(),
        unconditional_transformer=_ideogram_denoiser(),
    )


def _ideogram_denoiser() -> Ideogram4Transformer2DModel:
    denoiser = Ideogram4Transformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=1,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=13 * NARROW,
        mrope_section=(4, 2, 2),
    )
    return lively(denoiser, norm_q=2.0, norm_k=2.0)


MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "pixart_sigma": pixart_sigma,
    "lumina2": lumina2,
    "auraflow": auraflow,
    "ovis_image_7B": ovis_image,
    "prx_512": prx,
    "cogview4_6B": cogview4,
    "hunyuan_image_2_1": partial(hunyuan_image, distilled=False),
    "hunyuan_image_2_1_distilled": partial(hunyuan_image, distilled=True),
    "longcat_image": partial(longcat, LongCatImagePipeline),
    "longcat_image_edit": partial(longcat, LongCatImageEditPipeline, **SIX_STAGES),  # its pictures are large
    "ernie_image": ernie_image,
    "ernie_image_turbo": ernie_image,
    "ideogram4": ideogram,
}

PROOFS: Mapping[str, Proof] = {
    "longcat_image_edit": Proof(side=1024, steps=2),  # the smallest size that it makes
}
