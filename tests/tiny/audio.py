"""Tiny checkpoints of the models that make sound, at few samples a second, so that seconds of it cost little."""

from collections.abc import Callable, Mapping

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderOobleck,
    AutoencoderSAME,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    StableAudio3DiTModel,
    StableAudio3Pipeline,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.pipelines.ace_step import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer, AceStepConditionEncoder
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3Model,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    T5GemmaModuleConfig,
    UMT5Config,
    UMT5EncoderModel,
)

from .image_parts import TEXT_SIZE, t5_encoder
from .lively import lively
from .tokenizers import VOCABULARY, characters, gemma, qwen

RATE = 8000  # samples a second
LATENTS = 8  # channels
HEADS = {
    "hidden_size": TEXT_SIZE,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LANGUAGE_MODEL = {**HEADS, "num_hidden_layers": 2}


def _oobleck(*ratios: int) -> AutoencoderOobleck:
    vae = AutoencoderOobleck(
        encoder_hidden_size=2 * LATENTS,  # a mean and a spread for each
        downsampling_ratios=list(ratios),
        channel_multiples=[1] * len(ratios),
        decoder_channels=8,
        decoder_input_channels=LATENTS,
        sampling_rate=RATE,
    )
    with torch.no_grad():  # else all sounds have nearly the same latents
        vae.encoder.conv2.weight_g[:LATENTS] *= 50.0
    return lively(vae)


def stable_audio() -> DiffusionPipeline:
    """Sounds of up to four seconds."""
    transformer = StableAudioDiTModel(
        sample_size=500,  # latents
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=TEXT_SIZE,
        cross_attention_input_dim=TEXT_SIZE,
        global_states_input_dim=2 * TEXT_SIZE,
        time_proj_dim=16,
    )
    return StableAudioPipeline(
        vae=_oobleck(8, 8),
        text_encoder=lively(t5_encoder()),
        projection_model=lively(StableAudioProjectionModel(TEXT_SIZE, TEXT_SIZE, min_value=0, max_value=512)),
        tokenizer=characters(128),
        transformer=lively(transformer),
        scheduler=CosineDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500, sigma_data=1.0),
    )


def stable_audio_3() -> DiffusionPipeline:
    tokenizer = gemma(256)
    half = T5GemmaModuleConfig(vocab_size=len(tokenizer), **LANGUAGE_MODEL)
    transformer = StableAudio3DiTModel(
        io_channels=LATENTS,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=TEXT_SIZE,
        global_cond_dim=TEXT_SIZE,
        local_add_cond_dim=LATENTS + 1,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=2,
    )
    return StableAudio3Pipeline(
        vae=_same(),
        text_encoder=lively(T5GemmaEncoderModel(T5GemmaConfig(encoder=half, decoder=half, is_encoder_decoder=False))),
        tokenizer=tokenizer,
        duration_embedder=lively(StableAudio3DurationEmbedder(output_dim=TEXT_SIZE, fourier_dim=16)),
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0, stochastic_sampling=True),
    )


def _same() -> AutoencoderSAME:
    vae = AutoencoderSAME(
        patch_size=32,
        encoder_channels=16,
        encoder_c_mults=(2,),
        encoder_strides=(4,),
        encoder_transformer_depths=(1,),
        latent_dim=LATENTS,
        dim_heads=8,
        ff_mult=2,
        sampling_rate=RATE,
    )
    with torch.no_grad():  # the tokens that gather what lies beside them; as made, they look at everything alike
        for block in (*vae.encoder.blocks, *vae.decoder.blocks):
            block.new_tokens.normal_()
    return lively(vae)


ACE_STEP_HEADS = {**HEADS, "sliding_window": 16}
ACE_STEP_CODES = {"audio_acoustic_hidden_dim": LATENTS, "num_attention_pooler_hidden_layers": 1, **ACE_STEP_HEADS}
ACE_STEP_CONDITIONS = {
    "text_hidden_dim": TEXT_SIZE,
    "timbre_hidden_dim": LATENTS,
    "num_lyric_encoder_hidden_layers": 1,
    "num_timbre_encoder_hidden_layers": 1,
    **ACE_STEP_HEADS,
}


def ace_step() -> DiffusionPipeline:
    tokenizer = qwen()
    sizes = {"num_hidden_layers": 2, "in_channels": 3 * LATENTS, "audio_acoustic_hidden_dim": LATENTS}
    return AceStepPipeline(
        vae=_oobleck(4, 8, 10),
        text_encoder=lively(Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **LANGUAGE_MODEL))),
        tokenizer=tokenizer,
        transformer=lively(AceStepTransformer1DModel(is_turbo=True, **sizes, **ACE_STEP_HEADS)),
        condition_encoder=lively(AceStepConditionEncoder(**ACE_STEP_CONDITIONS)),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        audio_tokenizer=lively(AceStepAudioTokenizer(fsq_dim=TEXT_SIZE, **ACE_STEP_CODES), to_v=8.0),
        audio_token_detokenizer=lively(AceStepAudioTokenDetokenizer(**ACE_STEP_CODES)),
    )


LONGCAT_VAE = {
    "channels": 16,
    "c_mults": [1, 2],
    "strides": [8, 8],
    "latent_dim": LATENTS,
    "encoder_latent_dim": 2 * LATENTS,
    "downsampling_ratio": 64,
    "sample_rate": RATE,
}


def longcat_audio() -> DiffusionPipeline:
    sizes = {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": TEXT_SIZE, "latent_dim": LATENTS}
    texts = UMT5Config(vocab_size=len(VOCABULARY), d_model=TEXT_SIZE, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return LongCatAudioDiTPipeline(
        vae=lively(LongCatAudioDiTVae(**LONGCAT_VAE)),
        text_encoder=lively(UMT5EncoderModel(texts)),
        tokenizer=characters(),
        transformer=lively(LongCatAudioDiTTransformer(**sizes)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    )


MELS = 8
CLAP_TEXT = {
    "hidden_size": TEXT_SIZE,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
CLAP_SOUND = {
    "spec_size": 8,
    "window_size": 4,
    "num_mel_bins": MELS,
    "intermediate_size": 32,
    "depths": [1, 1],
    "num_attention_heads": [1, 1],
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "patch_size": 2,
    "patch_stride": 2,
    "patch_embeds_hidden_size": 8,
}
AUDIOLDM_UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": (TEXT_SIZE, TEXT_SIZE),
}
AUDIOLDM_VAE = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
AUDIOLDM_VOCODER = {
    "model_in_dim": MELS,
    "sampling_rate": RATE,
    "upsample_initial_channel": 16,
    "upsample_rates": [4, 4],
    "upsample_kernel_sizes": [8, 8],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "normalize_before": False,
}


def audioldm2() -> DiffusionPipeline:
    tokenizer = _roberta()
    clap = ClapConfig(
        text_config={**CLAP_TEXT, "vocab_size": len(tokenizer)}, audio_config=CLAP_SOUND, projection_dim=TEXT_SIZE
    )
    words = GPT2Config(n_embd=TEXT_SIZE, n_head=2, n_layer=2, vocab_size=8, n_positions=256, max_new_tokens=8)
    return AudioLDM2Pipeline(
        vae=lively(AutoencoderKL(**AUDIOLDM_VAE)),
        text_encoder=lively(ClapModel(clap)),
        text_encoder_2=lively(t5_encoder()),
        projection_model=lively(AudioLDM2ProjectionModel(TEXT_SIZE, TEXT_SIZE, TEXT_SIZE)),
        language_model=lively(GPT2LMHeadModel(words)),
        tokenizer=tokenizer,
        tokenizer_2=characters(),
        feature_extractor=ClapFeatureExtractor(),
        unet=lively(AudioLDM2UNet2DConditionModel(**AUDIOLDM_UNET)),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False),
        vocoder=lively(SpeechT5HifiGan(SpeechT5HifiGanConfig(**AUDIOLDM_VOCODER))),
    )


def _roberta() -> RobertaTokenizer:
    """One token a byte."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "stable_audio_open": stable_audio,
    "stable_audio_3_medium": stable_audio_3,
    "ace_step_v1_5_xl_turbo": ace_step,
    "ace_step_v1_5_turbo": ace_step,
    "longcat_audio_1B": longcat_audio,
    "audioldm2": audioldm2,
}
