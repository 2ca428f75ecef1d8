"""Tiny checkpoints of the LTX models: LTX-Video 0.9 and its later versions, and LTX-2, which makes sound as well."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.duration_head import LTX2DurationHead
from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    SiglipVisionConfig,
    T5Config,
    T5EncoderModel,
)

from tests.proof import Proof

from .lively import lively
from .tokenizers import VOCABULARY, characters, gemma
from .wan import amplify

LATENT_CHANNELS = 16
TEXT_SIZE = 32
INNER_SIZE = 32  # of the denoisers: 2 heads of 16

# ------------------------------------------------------------------------------------------------------------ LTX-Video

GAINS = {"attn2.to_v.weight": 20.0, "attn1.to_v.weight": 64.0}
VAE_GAINS = {
    "encoder.conv_out.conv.weight": 4.0,  # else all pictures look alike to the denoiser
    "decoder.conv_out.conv.weight": 1.6,  # more contrast
}


def _video_denoiser() -> LTXVideoTransformer3DModel:
    model = LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=INNER_SIZE // 2,
        cross_attention_dim=INNER_SIZE,
        num_layers=2,
        caption_channels=TEXT_SIZE,
    )
    return amplify(model.eval(), GAINS)


def _text_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=TEXT_SIZE, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


FIRST_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
}
LATER_VAE = {  # since 0.9.5; its decoder is told how much noise is left
    "block_out_channels": (8, 8, 8, 8, 8),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, True, True),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "decoder_inject_noise": (False, False, False, False),
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}


def _video_parts(vae: Mapping[str, Any], **scheduler: Any) -> dict[str, Any]:
    return {
        "tokenizer": characters(),
        "text_encoder": _text_encoder(),
        "transformer": _video_denoiser(),
        "vae": amplify(AutoencoderKLLTXVideo(latent_channels=LATENT_CHANNELS, **vae).eval(), VAE_GAINS),
        "scheduler": FlowMatchEulerDiscreteScheduler(**scheduler),
    }


DYNAMIC_SHIFT = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}


def first_video() -> DiffusionPipeline:
    """LTX-Video 0.9: the shift of its schedule follows the size."""
    return LTXPipeline(**_video_parts(FIRST_VAE, **DYNAMIC_SHIFT))


def later_video(**scheduler: Any) -> DiffusionPipeline:
    """LTX-Video since 0.9.5, which takes pictures and clips as conditions at any frame."""
    return LTXConditionPipeline(**_video_parts(LATER_VAE, **scheduler))


# ---------------------------------------------------------------------------------------------------------------- LTX-2

TEXT_LAYERS = 2
SOUND_CHANNELS, MEL_BINS = 2, 16
SOUND_INNER_SIZE = 16  # of the denoiser's half that makes the sound: 2 heads of 8


LETTERS = {  # of the language models
    "vocab_size": len(gemma()),
    "hidden_size": TEXT_SIZE,
    "intermediate_size": 32,
    "num_hidden_layers": TEXT_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.5,  # else all letters look alike
}


def _gemma_3() -> Gemma3ForConditionalGeneration:
    """A language model that has eyes too, which the pipelines never open."""
    eyes = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    config = Gemma3Config(text_config=Gemma3TextConfig(**LETTERS), vision_config=eyes)
    return Gemma3ForConditionalGeneration(config).eval()


def _gemma_4() -> Gemma4UnifiedForConditionalGeneration:
    """The text half alone of the one that LTX-2.5 reads with."""
    config = Gemma4UnifiedConfig(text_config=Gemma4UnifiedTextConfig(**LETTERS), vision_config=None, audio_config=None)
    return Gemma4UnifiedForConditionalGeneration(config).eval()


def _connectors(sound_head_size: int = TEXT_SIZE // 2, **config: Any) -> LTX2TextConnectors:
    """What lies between the text encoder and the two halves of the denoiser."""
    model = LTX2TextConnectors(
        caption_channels=TEXT_SIZE,
        text_proj_in_factor=TEXT_LAYERS + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=TEXT_SIZE // 2,
        video_connector_num_layers=1,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=sound_head_size,
        audio_connector_num_layers=1,
        rope_type="split",
        **config,
    )
    # A thousand registers stand for padding: without values of their own they only carry what the text says.
    return amplify(lively(model, to_v=40.0), {"learnable_registers": 0.0, "bias": 0.0})


def _joint_denoiser(**config: Any) -> LTX2VideoTransformer3DModel:
    model = LTX2VideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=INNER_SIZE // 2,
        cross_attention_dim=INNER_SIZE,
        audio_in_channels=SOUND_CHANNELS * MEL_BINS // 4,
        audio_out_channels=SOUND_CHANNELS * MEL_BINS // 4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=SOUND_INNER_SIZE // 2,
        audio_cross_attention_dim=SOUND_INNER_SIZE,
        num_layers=2,
        caption_channels=TEXT_SIZE,
        rope_type="split",
        **config,
    )
    return lively(model, attn2__to_v=20.0, attn1__to_v=80.0)


def _joint_vae() -> AutoencoderKLLTX2Video:
    model = AutoencoderKLLTX2Video(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    return amplify(model.eval(), VAE_GAINS)


def _sound_vae() -> AutoencoderKLLTX2Audio:
    return AutoencoderKLLTX2Audio(
        base_channels=8, latent_channels=SOUND_CHANNELS, num_res_blocks=1, mel_bins=MEL_BINS, resolution=32
    ).eval()


RESNETS = {"resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3, 5]]}
LOW_HZ, HIGH_HZ = 16000, 48000
MELS_OUT = 8  # of the sound that the second half of the wide vocoder starts from


def _vocoder() -> LTX2Vocoder:
    """160 samples for each column of the spectrogram."""
    return LTX2Vocoder(
        in_channels=2 * MEL_BINS,
        hidden_channels=16,
        upsample_kernel_sizes=[20, 32],
        upsample_factors=[10, 16],
        output_sampling_rate=LOW_HZ,
        **RESNETS,
    ).eval()


def _wide_vocoder() -> LTX2VocoderWithBWE:
    """The same, and then a second one that adds the high tones at three times the rate."""
    return LTX2VocoderWithBWE(
        in_channels=2 * MEL_BINS,
        hidden_channels=16,
        upsample_kernel_sizes=[20, 32],
        upsample_factors=[10, 16],
        bwe_in_channels=2 * MELS_OUT,
        bwe_hidden_channels=16,
        bwe_upsample_kernel_sizes=[29, 32],
        bwe_upsample_factors=[15, 16],
        bwe_resnet_kernel_sizes=RESNETS["resnet_kernel_sizes"],
        bwe_resnet_dilations=RESNETS["resnet_dilations"],
        num_mel_channels=MELS_OUT,
        input_sampling_rate=LOW_HZ,
        output_sampling_rate=HIGH_HZ,
        **RESNETS,
    ).eval()


def _joint_parts(**scheduler: Any) -> dict[str, Any]:
    """What all of LTX-2 has."""
    return {
        "tokenizer": gemma(),
        "vae": _joint_vae(),
        "audio_vae": _sound_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**scheduler),
    }


def joint(**scheduler: Any) -> DiffusionPipeline:
    """LTX-2: pictures and sound denoised together."""
    return LTX2Pipeline(
        text_encoder=_gemma_3(),
        connectors=_connectors(),
        transformer=_joint_denoiser(),
        vocoder=_vocoder(),
        **_joint_parts(**scheduler),
    )


LATER_CONNECTORS = {  # each half has a projection of its own
    "sound_head_size": SOUND_INNER_SIZE // 2,
    "per_modality_projections": True,
    "video_hidden_dim": INNER_SIZE,
    "audio_hidden_dim": SOUND_INNER_SIZE,
    "video_gated_attn": True,
    "audio_gated_attn": True,
    "proj_bias": True,
}
LATER_DENOISER = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}


def joint_2_3(**scheduler: Any) -> DiffusionPipeline:
    """LTX-2.3: gates in the attention, the text modulated by the time, and sound at 48 kHz."""
    return LTX2Pipeline(
        text_encoder=_gemma_3(),
        connectors=_connectors(**LATER_CONNECTORS),
        transformer=_joint_denoiser(**LATER_DENOISER),
        vocoder=_wide_vocoder(),
        **_joint_parts(**scheduler),
    )


def joint_2_5() -> DiffusionPipeline:
    """LTX-2.5: another language model, and a part that guesses the length, which is never asked."""
    head = LTX2DurationHead(
        video_cross_attention_dim=INNER_SIZE,
        audio_cross_attention_dim=SOUND_INNER_SIZE,
        pooler_hidden_dim=16,
        num_pooler_heads=2,
        mlp_hidden_dim=16,
    )
    return LTX2Pipeline(
        text_encoder=_gemma_4(),
        connectors=_connectors(**LATER_CONNECTORS),
        transformer=_joint_denoiser(**LATER_DENOISER, ff_bias=False, use_keyframes_abs_pos_embedding=True),
        vocoder=_wide_vocoder(),
        duration_head=head.eval(),
        **_joint_parts(),
    )


LONGER = Proof(frames=33)  # 17 of them are the source's
PROOFS = {
    "ltxv_0_9_5_2B-v2v": LONGER,
    "ltxv_0_9_7_13B-v2v": LONGER,
    "ltxv_0_9_7_distilled_13B-v2v": LONGER,
    "ltxv_0_9_8_distilled_13B-v2v": LONGER,
    "ltx2_19B-v2v": LONGER,
    "ltx2_distilled_19B-v2v": LONGER,
    "ltx2_3_22B-v2v": LONGER,
    "ltx2_3_distilled_22B-v2v": LONGER,
    "ltx2_5_22B-v2v": LONGER,
    "ltx2_5_distilled_22B-v2v": LONGER,
}
MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "ltxv_2B": first_video,
    "ltxv_0_9_5_2B": partial(later_video, shift_terminal=0.1),
    "ltxv_0_9_7_13B": partial(later_video, shift_terminal=0.1),
    "ltxv_0_9_7_distilled_13B": later_video,
    "ltxv_0_9_8_distilled_13B": later_video,
    "ltx2_19B": partial(joint, **DYNAMIC_SHIFT),
    "ltx2_distilled_19B": joint,
    "ltx2_3_22B": partial(joint_2_3, **DYNAMIC_SHIFT),
    "ltx2_3_distilled_22B": joint_2_3,
    "ltx2_5_22B": joint_2_5,
    "ltx2_5_distilled_22B": joint_2_5,
}
