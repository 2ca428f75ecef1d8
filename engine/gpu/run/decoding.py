"""From latents to frames: the precision in which a VAE decodes, and Wan's VAE piece by piece."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, unpatchify
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn

from engine.gpu.run.results import pixels


def set_precision(pipe: Any, wanted: str, device: torch.device) -> None:
    """Let the VAE decode in 16 bits where that is safe; `wanted` is auto (16 on CUDA), 16 or 32.

    Safe is Wan's: bfloat16's 8 bits of mantissa distinguish all levels. Inputs and outputs keep the encoder's dtype:
    an error in a condition would show in all that is made from it.
    """
    vae: Any = getattr(pipe, "vae", None)
    halved = wanted == "16" or (wanted == "auto" and device.type == "cuda")
    if not halved or not isinstance(vae, AutoencoderKLWan) or vae.dtype != torch.float32:
        return
    for part in (vae.post_quant_conv, vae.decoder):
        part.to(torch.bfloat16)
        part.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.bfloat16), *inputs[1:]))
    vae.decoder.register_forward_hook(lambda _module, _inputs, output: output.float())


def width_of(pipe: Any) -> float:
    """The width of the numbers in which the VAE decodes, in multiples of 16 bits."""
    vae: Any = getattr(pipe, "vae", None)
    decoder = getattr(vae, "decoder", vae)
    weight = next(decoder.parameters(), None) if isinstance(decoder, nn.Module) else None
    return 1.0 if weight is None else weight.element_size() / 2


@torch.no_grad()
def pieces(pipe: Any, latents: torch.Tensor, frames: int) -> Iterator[torch.Tensor]:
    """Decode the normalised latents of one video with Wan's VAE: the frames of each latent frame, (F, H, W, 3) uint8.

    latents: (1, C, F, H, W); a class may have put reference pictures before those of the video's `frames`. As those of
    `vae.decode`, bit by bit, but the whole video is never on the card, and is encoded while it is decoded.
    """
    vae = pipe.vae
    if hook := getattr(vae, "_hf_hook", None):  # it moves the VAE to the card, but only in `decode`
        hook.pre_forward(vae)
    count = (frames - 1) // vae.config.scale_factor_temporal + 1
    z = latents[:, :, -count:].to(get_module_execution_device(vae), dtype=vae.dtype)
    about = (vae.config.latents_mean, vae.config.latents_std)
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1).to(z) for values in about)
    z = z / (1.0 / deviation) + mean  # as the classes write it: the last bit counts
    sides = (vae.tile_sample_min_height, vae.tile_sample_min_width)
    longer = any(size > side // vae.spatial_compression_ratio for size, side in zip(z.shape[3:], sides, strict=True))
    try:
        # A tile goes through all frames at once, so that tiles can't be decoded frame by frame.
        for chunk in [vae.decode(z, return_dict=False)[0]] if vae.use_tiling and longer else _chunks(vae, z):
            yield pixels(chunk[0].transpose(0, 1) * 0.5 + 0.5)
    finally:
        vae.clear_cache()
        pipe.maybe_free_model_hooks()


def _chunks(vae: Any, z: torch.Tensor) -> Iterator[torch.Tensor]:
    """(1, 3, F, H, W) in -1..1 for each latent frame: one frame for the first, four for every other."""
    vae.clear_cache()
    z = vae.post_quant_conv(z)
    for i in range(z.shape[2]):
        vae._conv_idx = [0]
        memory = {"feat_cache": vae._feat_map, "feat_idx": vae._conv_idx}
        chunk = vae.decoder(z[:, :, i : i + 1], first_chunk=i == 0, **memory)
        if vae.config.patch_size is not None:
            chunk = unpatchify(chunk, patch_size=vae.config.patch_size)
        yield chunk.clamp(-1.0, 1.0)
