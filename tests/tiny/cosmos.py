"""Tiny checkpoints of Cosmos 1, Predict 2, Predict and Transfer 2.5, and Cosmos 3.

None has a safety checker: the classes build their own, which is not part of a checkpoint.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKLCosmos,
    AutoencoderKLWan,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2_5_TransferPipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    CosmosControlNetModel,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from tests.proof import Proof

from . import image_parts, qwen_vl, tokenizers
from .lively import lively

CHANNELS = 16  # of the latents; a class that is given pictures has one more, which marks them
PLAIN, MARKED = {"in_channels": CHANNELS}, {"in_channels": CHANNELS + 1}
BLOCK = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "mlp_ratio": 2.0,
    "text_embed_dim": image_parts.TEXT_SIZE,
    "adaln_lora_dim": 8,
}
DENOISER = BLOCK | {"out_channels": CHANNELS, "num_layers": 2, "max_size": (128, 16, 16)}
# Of Cosmos 2.5: the states of all layers of the text encoder, side by side, are narrowed first.
NARROWED = {
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 2 * qwen_vl.TEXT_SIZE,
    "encoder_hidden_states_channels": image_parts.TEXT_SIZE,
    "extra_pos_embed_type": None,
    "rope_scale": (1.0, 3.0, 3.0),
}
PICTURE_STATES = {"img_context_dim_in": 8, "img_context_dim_out": 24}


def _vae(channels: int = CHANNELS, **config: Any) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        **config,
    )
    return lively(vae)


def _denoiser(text_gain: float = 20.0, **config: Any) -> CosmosTransformer3DModel:
    """Texts are padded to 512 tokens, which all look alike: the gain makes up for their share of the attention."""
    return lively(CosmosTransformer3DModel(**DENOISER | config), attn2__to_v=text_gain)


def _cosmos_1(pipeline: type[DiffusionPipeline], **denoiser: Any) -> DiffusionPipeline:
    vae = AutoencoderKLCosmos(
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        latent_channels=CHANNELS,
        num_layers=1,
    )
    return pipeline(
        text_encoder=image_parts.t5_encoder(),
        tokenizer=tokenizers.characters(),
        transformer=_denoiser(**denoiser),
        vae=lively(vae, decoder__conv_out__conv_s=0.4),  # else each colour is all or nothing
        scheduler=EDMEulerScheduler(final_sigmas_type="sigma_min"),
    )


def _cosmos_2(pipeline: type[DiffusionPipeline], **denoiser: Any) -> DiffusionPipeline:
    denoiser = {"extra_pos_embed_type": None, "rope_scale": (1.0, 3.0, 3.0), **denoiser}
    return pipeline(
        text_encoder=image_parts.t5_encoder(),
        tokenizer=tokenizers.characters(),
        transformer=_denoiser(**denoiser),
        vae=_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    )


def _cosmos_2_5(pipeline: type[DiffusionPipeline], denoiser: Mapping[str, Any], **parts: Any) -> DiffusionPipeline:
    text = qwen_vl.tokenizer()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_karras_sigmas=True,
        sigma_max=200.0,
        sigma_min=0.01,
    )
    return pipeline(
        # So that the states of the padding, most of 512, tell of the words before it.
        text_encoder=qwen_vl.encoder(text, self_attn__q_proj=4.0, self_attn__v_proj=8.0),
        tokenizer=text,
        transformer=_denoiser(text_gain=8.0, **NARROWED | denoiser),
        vae=_vae(),
        scheduler=scheduler,
        **parts,
    )


def _transfer() -> DiffusionPipeline:
    """A second denoiser reads the control video, and adds to every block of the first."""
    control = CosmosControlNetModel(
        **BLOCK | NARROWED | PICTURE_STATES,
        n_controlnet_blocks=2,
        in_channels=130,
        latent_channels=CHANNELS + 2,
        model_channels=24,
        max_size=DENOISER["max_size"],
    )
    denoiser = MARKED | PICTURE_STATES | {"img_context_num_tokens": 4, "controlnet_block_every_n": 1}
    return _cosmos_2_5(Cosmos2_5_TransferPipeline, denoiser, controlnet=lively(control))


def _cosmos_3() -> DiffusionPipeline:
    """The denoiser is the language model as well. Latents are 16x smaller, and a token holds 2x2 of them."""
    channels = 48
    text = qwen_vl.tokenizer()
    denoiser = Cosmos3OmniTransformer(
        vocab_size=len(text),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        latent_channel=channels,
        patch_latent_dim=4 * channels,
        rope_axes_dim=(2, 2, 2),
    )
    return Cosmos3OmniPipeline(
        transformer=lively(denoiser),
        text_tokenizer=text,
        vae=_vae(channels, patch_size=2, in_channels=12, out_channels=12, is_residual=True, scale_factor_spatial=16),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=10.0),
    )


_text_to_world = partial(_cosmos_1, CosmosTextToWorldPipeline, **PLAIN)
_video_to_world = partial(_cosmos_2, Cosmos2VideoToWorldPipeline, **MARKED)
_text_to_image = partial(_cosmos_2, Cosmos2TextToImagePipeline, **PLAIN)

MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "cosmos1_t2w_7B": _text_to_world,
    "cosmos1_v2w_7B": partial(_cosmos_1, CosmosVideoToWorldPipeline, **MARKED),
    "cosmos1_t2w_14B": _text_to_world,
    "cosmos2_v2w_2B": _video_to_world,
    "cosmos2_v2w_14B": _video_to_world,
    "cosmos25_2B": partial(_cosmos_2_5, Cosmos2_5_PredictBasePipeline, MARKED),
    "cosmos25_transfer_2B": _transfer,
    "cosmos3_nano": _cosmos_3,
    "cosmos2_t2i_2B": _text_to_image,
    "cosmos2_t2i_14B": _text_to_image,
}
# A clip that is gone on from leaves its last frames in the new one: there has to be more than those.
PROOFS: Mapping[str, Proof] = {
    f"{model_id}-v2v": Proof(frames=17)
    for model_id in ("cosmos1_v2w_7B", "cosmos2_v2w_2B", "cosmos2_v2w_14B", "cosmos25_2B", "cosmos3_nano")
}
