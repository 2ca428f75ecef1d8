"""Parts that the picture models share: the VAEs, the text encoders and the schedules, tiny and random.

All models come in `eval` mode: with dropout no two runs would be equal.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from tests.proof import Proof

from .tokenizers import VOCABULARY

TEXT_SIZE = 32  # of the states of every text encoder
LANGUAGE = {  # of every language model that encodes texts
    "hidden_size": TEXT_SIZE,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SHIFT_BY_SIZE = {"shift": 3.0, "use_dynamic_shifting": True}  # a schedule that follows the size of the picture
VAE_WIDTH = 8  # channels of every stage

VAE_STAGES = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (VAE_WIDTH,) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": 32,
}
# As it is made, a VAE paints almost plain grey, and gives almost the same latents for any picture.
VAE_GAINS = {"decoder.conv_out.weight": 2.0, "encoder.conv_out.weight": 16.0}
CERTAIN = -20.0  # a log variance: no noise hides what a picture's latents are

# How a change of a picture is asked for: at a strength of 0.8, four steps would all be done, from noise alone.
PARTLY = Proof(settings={"denoising_strength": 0.6})

Part = TypeVar("Part", bound=nn.Module)


def amplified(part: Part, gains: Mapping[str, float]) -> Part:
    """`part` in `eval` mode, with every parameter whose name ends in a key of `gains` multiplied by its value."""
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            for ending, gain in gains.items():
                if name.endswith(ending):
                    parameter.mul_(gain)
    return part.eval()


def vae(latent_channels: int = 16, **config: Any) -> AutoencoderKL:
    """The 8x VAE of most picture models; `config` goes over the shape that all of them have here."""
    part = AutoencoderKL(latent_channels=latent_channels, **{"scaling_factor": 1.0, **VAE_STAGES, **config})
    return certain(amplified(part, VAE_GAINS))


def certain(part: Any) -> Any:
    """The VAE `part`, whose encoder from now on gives its means, without a doubt."""
    last = part.quant_conv or part.encoder.conv_out
    with torch.no_grad():
        for parameter, value in ((last.weight, 0.0), (last.bias, CERTAIN)):
            parameter[len(parameter) // 2 :] = value
    return part


def t5_encoder(size: int = TEXT_SIZE) -> T5EncoderModel:
    """For the tokenizer `characters`; its states have `size` channels."""
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=size, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def clip_encoder(tokenizer: PreTrainedTokenizerBase, **config: Any) -> CLIPTextModel:
    """For `tokenizer`, which is a `clip`."""
    return CLIPTextModel(_clip_config(tokenizer, **config)).eval()


def projecting_clip_encoder(tokenizer: PreTrainedTokenizerBase, **config: Any) -> CLIPTextModelWithProjection:
    """For `tokenizer`, which is a `clip`; its pooled state has `TEXT_SIZE` channels too."""
    return CLIPTextModelWithProjection(_clip_config(tokenizer, projection_dim=TEXT_SIZE, **config)).eval()


def _clip_config(tokenizer: PreTrainedTokenizerBase, **config: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=TEXT_SIZE,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,  # else all texts look alike to it
        **config,
    )
