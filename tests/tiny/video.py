"""Tiny checkpoints of video models that stand alone: Mochi, Allegro, Latte, EasyAnimate, Motif, SVD, AnimateDiff."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AllegroPipeline,
    AllegroTransformer3DModel,
    AnimateDiffPipeline,
    AutoencoderKLAllegro,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    DiffusionPipeline,
    EasyAnimateInpaintPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    MotionAdapter,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipImageProcessorPil,
    T5Gemma2Encoder,
    T5Gemma2EncoderConfig,
)

from . import tokenizers
from .image_parts import TEXT_SIZE, certain, clip_encoder, t5_encoder, vae
from .lively import lively
from .sana import wan_vae

IMAGE_SIDE = 32  # pixels, of what Motif's image encoder looks at
EASY_CHANNELS = 4  # of EasyAnimate's latents
CLIP_SIDE = 224  # SVD makes pictures of this size by itself, before the processor sees them


def _mochi() -> DiffusionPipeline:
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=TEXT_SIZE,
        time_embed_dim=16,
    )
    decoder = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    )
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=decoder.eval(),
        text_encoder=t5_encoder(),
        tokenizer=tokenizers.characters(256),
        transformer=transformer.eval(),
    )


def _allegro() -> DiffusionPipeline:
    """Its VAE works in tiles of 24 frames and, here, 16 x 16 pixels: no other size comes out."""
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=2,
        sample_width=2,
        sample_frames=6,
        caption_channels=TEXT_SIZE,
    )
    decoder = AutoencoderKLAllegro(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, sample_size=16)
    with warnings.catch_warnings():  # of numpy, about how the class copies a tensor
        warnings.simplefilter("ignore", DeprecationWarning)
        schedule = EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return AllegroPipeline(
        tokenizer=tokenizers.characters(),
        text_encoder=t5_encoder(),
        vae=decoder.eval(),
        transformer=transformer.eval(),
        scheduler=schedule,
    )


def _latte() -> DiffusionPipeline:
    """It was made for 16 frames, and knows no other number."""
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=2,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=TEXT_SIZE,
    )
    return LattePipeline(
        tokenizer=tokenizers.characters(),
        text_encoder=t5_encoder(),
        vae=vae(latent_channels=4),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )


def _easyanimate(pipeline: type[DiffusionPipeline] = EasyAnimatePipeline, beside: int = 0) -> DiffusionPipeline:
    """`beside` counts the channels that go in beside the noise: a mask and a masked video."""
    tokenizer = tokenizers.qwen()
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=EASY_CHANNELS + beside,
        out_channels=EASY_CHANNELS,
        patch_size=2,
        num_layers=2,
        mmdit_layers=2,
        time_embed_dim=16,
        add_norm_text_encoder=True,
        text_embed_dim=TEXT_SIZE,
    )
    decoder = AutoencoderKLMagvit(
        latent_channels=EASY_CHANNELS, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2
    )
    decoder.register_to_config(cache_mag_vae=True)  # the inpainting class asks for it; no constructor knows it
    return pipeline(
        vae=certain(_present(lively(decoder))),
        text_encoder=_qwen2(tokenizer),
        tokenizer=tokenizer,
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _present(decoder: AutoencoderKLMagvit) -> AutoencoderKLMagvit:
    """Its convolutions look more at the present frame than at those before: else the late ones would hardly count."""
    with torch.no_grad():
        for layer in decoder.modules():
            if isinstance(layer, nn.Conv3d) and layer.kernel_size[0] == 3:
                layer.weight[:, :, :2] *= 0.2
    return decoder


def _qwen2(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    mark = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_SIZE,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": TEXT_SIZE, "num_heads": 2},
        image_token_id=mark("<|image_pad|>"),
        video_token_id=mark("<|video_pad|>"),
        vision_start_token_id=mark("<|vision_start|>"),
        vision_end_token_id=mark("<|vision_end|>"),
    )
    return Qwen2VLForConditionalGeneration(config).eval()


def _motif() -> DiffusionPipeline:
    tokenizer = tokenizers.gemma()
    transformer = MotifVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_SIZE,
        image_embed_dim=32,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    return MotifVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=wan_vae(),
        text_encoder=_seeing_gemma(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=lively(transformer),
        guider=AdaptiveProjectedGuidance(guidance_scale=8.0),
        feature_extractor=SiglipImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}),
    )


def _seeing_gemma(vocabulary: int) -> T5Gemma2Encoder:
    """The encoder of texts, whose eye the image task borrows."""
    config = T5Gemma2EncoderConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": TEXT_SIZE,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "initializer_range": 0.2,
            "dropout_rate": 0.0,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIDE,
            "patch_size": 16,
        },
        mm_tokens_per_image=4,
        boi_token_index=0,
        eoi_token_index=0,
        image_token_index=0,
    )
    return T5Gemma2Encoder(config, eoi_token_index=0).eval()


def _stable_video(frames: int) -> DiffusionPipeline:
    unet = UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=48,
        cross_attention_dim=32,
        num_attention_heads=2,
        num_frames=frames,
        sample_size=4,
    )
    decoder = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32,) * 4, layers_per_block=1
    )
    schedule = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        interpolation_type="linear",
        use_karras_sigmas=True,
        timestep_spacing="leading",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        steps_offset=1,
    )
    return StableVideoDiffusionPipeline(
        vae=decoder.eval(),
        image_encoder=_clip_eye(),
        unet=unet.eval(),
        scheduler=schedule,
        feature_extractor=CLIPImageProcessorPil(),
    )


def _clip_eye() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=CLIP_SIDE,
        patch_size=CLIP_SIDE // 4,
        initializer_range=0.2,
    )
    return CLIPVisionModelWithProjection(config).eval()


def _animatediff() -> DiffusionPipeline:
    tokenizer = tokenizers.clip()
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=TEXT_SIZE,
        attention_head_dim=2,
        sample_size=8,
    )
    motion = MotionAdapter(
        block_out_channels=(8, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    return AnimateDiffPipeline(
        vae=vae(latent_channels=4),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet.eval(),
        motion_adapter=motion.eval(),
        scheduler=DDIMScheduler(
            beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
    )


MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "mochi_10B": _mochi,
    "allegro_2.8B": _allegro,
    "latte_1B": _latte,
    "easyanimate_7B": _easyanimate,
    "easyanimate_12B": _easyanimate,
    "easyanimate_inp_12B": partial(_easyanimate, EasyAnimateInpaintPipeline, 1 + EASY_CHANNELS),
    "motif_video_2B": _motif,
    "svd_xt": partial(_stable_video, 25),
    "svd": partial(_stable_video, 14),
    "animatediff_sd15": _animatediff,
}
