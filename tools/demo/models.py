"""The parts of the pipeline: Wan's own classes, very small, with starting weights that spare a long warm-up."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from .latents import CHANNELS, Scale

LAYERS = 4
TEXT_DIM = 64
FLOW_SHIFT = 5.0
PAD_REPULSION = 0.3
ATTENTION_SHARPNESS = 1.3
CROSS_ATTENTION_GAIN = 0.25
IDENTITY_GAIN = 0.7


def build_vae(scale: Scale | None = None) -> AutoencoderKLWan:
    """The residual VAE of Wan 2.2: 8 x 8 pixels and 4 frames a latent, 16 channels."""
    statistics = {} if scale is None else {"latents_mean": scale.mean.tolist(), "latents_std": scale.std.tolist()}
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        **statistics,
    )


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    """Two layers, trained together with the transformer."""
    config = UMT5Config(
        vocab_size=vocabulary_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def build_transformer() -> WanTransformer3DModel:
    """Wan's transformer with starting weights near the identity and deaf to padding."""
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        ffn_dim=512,
        num_layers=LAYERS,
        rope_max_seq_len=128,
    )
    with torch.no_grad():
        _start_near_identity(transformer)
        _start_deaf_to_padding(transformer)
    return transformer


def _start_near_identity(transformer: WanTransformer3DModel) -> None:
    """Copy the input to the output: at high noise the velocity is nearly the input itself."""
    embedding, projection = transformer.patch_embedding, transformer.proj_out
    frame = torch.linalg.qr(torch.randn(embedding.weight.flatten(1).shape)).Q  # (inner, 64), orthonormal columns
    embedding.weight.copy_(frame.view_as(embedding.weight))
    # the embedding reads a patch as (channel, y, x), the projection writes (y, x, channel)
    patch = frame.T.view(CHANNELS, 4, -1).transpose(0, 1).flatten(0, 1)
    projection.weight.copy_(IDENTITY_GAIN * patch)
    for layer in (embedding, projection, transformer.condition_embedder.time_proj):
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(transformer.condition_embedder.time_proj.weight)
    for block in transformer.blocks:
        block.attn2.to_out[0].weight.mul_(CROSS_ATTENTION_GAIN)


def _start_deaf_to_padding(transformer: WanTransformer3DModel) -> None:
    """The pipeline pads prompts with zeros and masks nothing: unless padding starts repelled, it drowns the words.

    A zero token's key is the key bias alone. Pointing it away from where every query points leaves real words
    most of the attention from the first step.
    """
    text = transformer.condition_embedder.text_embedder
    nn.init.zeros_(text.linear_1.bias)
    nn.init.zeros_(text.linear_2.bias)
    for block in transformer.blocks:
        away = _random_signs(block.attn2.to_q.bias)
        block.attn2.to_q.bias.copy_(away)
        block.attn2.to_k.bias.copy_(-PAD_REPULSION * away)
        block.attn2.norm_q.weight.fill_(ATTENTION_SHARPNESS)
        block.attn2.norm_k.weight.fill_(ATTENTION_SHARPNESS)


def _random_signs(like: Tensor) -> Tensor:
    return torch.randint(0, 2, like.shape).to(like) * 2 - 1


def build_scheduler() -> UniPCMultistepScheduler:
    """Wan's own sampler."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)
