"""The VAE as two regressions that know nothing of each other: latents to video, and video to latents.

The latents are given by `latents.py`, so there is no bottleneck to learn and no KL term: the decoder learns what
sharp shapes the sixteen numbers of a block stand for, the encoder learns to produce those numbers.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn
from torch.nn import functional

from . import checkpoint, latents, shapes
from .latents import Scale
from .models import build_vae
from .scene import Scene, place, sample_traits

Crop = tuple[int, int, int]  # frames, height, width

WHOLE = (17, 64, 64)
JITTER = 14  # pixels that a crop may miss the shape's centre by
PIXEL_NOISE = 0.02
FOREGROUND_WEIGHT = 4.0
SURE = -10.0  # log-variance: the posterior is a point
WARMUP_STEPS = 50
SAVE_EVERY, LOG_EVERY = 100, 50


@dataclass(frozen=True)
class Phase:
    """`crops` are used in turn, as many clips of each as fit in `pixels`.

    `noise` is the largest deviation of what is added to normalized latents: the decoder learns to clean up what the
    transformer leaves. `squares` trains the decoder on squared error alone, which is what PSNR counts.
    """

    steps: int
    lr: float
    crops: tuple[Crop, ...]
    pixels: int = 4 * 5 * 32 * 32
    noise: float = 0.4
    squares: bool = False


# Crops around the shape train as well as whole frames and cost far less.
SHORT_CROPS: tuple[Crop, ...] = (*((5, 32, 32),) * 5, (9, 32, 32), (5, 48, 48), (9, 64, 64))
# The decoder remembers earlier chunks: without whole clips it drifts towards their end.
LONG_CROPS: tuple[Crop, ...] = (*((17, 32, 32),) * 3, (17, 64, 64))
WIDE_CROPS: tuple[Crop, ...] = (*((17, 32, 32),) * 3, *((9, 48, 48),) * 2, (17, 64, 64))
DECODER = (
    Phase(steps=3400, lr=3e-3, crops=SHORT_CROPS),
    Phase(steps=700, lr=2e-3, crops=LONG_CROPS, pixels=2 * 17 * 32 * 32, noise=0.25),
    Phase(steps=400, lr=2e-3, crops=LONG_CROPS, pixels=2 * 17 * 32 * 32, noise=0.1),
    Phase(steps=1600, lr=2.5e-3, crops=WIDE_CROPS, pixels=2 * 17 * 32 * 32, noise=0.2),
    Phase(steps=700, lr=2e-3, crops=WIDE_CROPS, pixels=2 * 17 * 32 * 32, noise=0.1),
    Phase(steps=2000, lr=2e-3, crops=WIDE_CROPS, pixels=2 * 17 * 32 * 32, noise=0.05, squares=True),
)
ENCODER = (
    Phase(steps=1800, lr=3e-3, crops=SHORT_CROPS),
    Phase(steps=1500, lr=2e-3, crops=SHORT_CROPS),
    Phase(steps=600, lr=1e-3, crops=SHORT_CROPS),
    Phase(steps=700, lr=1e-3, crops=WIDE_CROPS),
    Phase(steps=1000, lr=1.5e-3, crops=WIDE_CROPS, pixels=2 * 17 * 32 * 32),
)

Loss = Callable[[AutoencoderKLWan, Scale, "Sample"], Tensor]


class Sample(NamedTuple):
    """What one step learns from; `rng` is for noise and is used once."""

    scenes: list[Scene]
    mask: Tensor  # (N, F, H, W)
    rng: torch.Generator
    phase: Phase


def decode_unclamped(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """`vae.decode` without its clamp, which gives saturated pixels no gradient: z (N, 16, k+1, h, w) → video."""
    vae.clear_cache()
    z = vae.post_quant_conv(z)
    chunks = []
    for i in range(z.shape[2]):
        vae._conv_idx = [0]
        chunk = z[:, :, i : i + 1]
        chunks.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, dim=2), patch_size=vae.config.patch_size)


def _edges(video: Tensor) -> tuple[Tensor, Tensor]:
    return video.diff(dim=-1), video.diff(dim=-2)


def reconstruction_loss(guess: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """L1, squares and gradients; the shape and its surroundings count more than the plain rest. mask: (N, F, H, W)"""
    near = functional.max_pool2d(mask, 5, stride=1, padding=2)[:, None]
    weight = 1 + (FOREGROUND_WEIGHT - 1) * near
    error = guess - truth
    pixels = (weight * (error.abs() + 0.5 * error.square())).mean()
    slopes = sum((a - b).abs().mean() for a, b in zip(_edges(guess), _edges(truth), strict=True))
    return pixels + 0.3 * slopes


def decoder_loss(vae: AutoencoderKLWan, scale: Scale, sample: Sample) -> Tensor:
    """Video from latents with noise of a random strength."""
    z = scale.normalize(latents.encode(sample.scenes, sample.mask))
    strength = sample.phase.noise * torch.rand(len(z), 1, 1, 1, 1, generator=sample.rng)
    z = scale.restore(z + strength * torch.randn(z.shape, generator=sample.rng))
    guess = decode_unclamped(vae, z.to(vae.device))
    truth = shapes.paint(sample.scenes, sample.mask).to(vae.device)
    if sample.phase.squares:
        return (guess - truth).square().mean()
    return reconstruction_loss(guess, truth, sample.mask.to(vae.device))


def encoder_loss(vae: AutoencoderKLWan, scale: Scale, sample: Sample) -> Tensor:
    """Squared error of the normalized latents."""
    truth = shapes.paint(sample.scenes, sample.mask)
    video = truth + PIXEL_NOISE * torch.randn(truth.shape, generator=sample.rng)
    guess = vae._encode(video.to(vae.device)).chunk(2, dim=1)[0].cpu()
    return (scale.normalize(guess) - scale.normalize(latents.encode(sample.scenes, sample.mask))).square().mean()


def decoder_of(vae: AutoencoderKLWan) -> nn.Module:
    """The parts that turn latents to video."""
    return nn.ModuleList([vae.post_quant_conv, vae.decoder])


def encoder_of(vae: AutoencoderKLWan) -> nn.Module:
    """The parts that turn video to latents, the variance half of them fixed."""
    with torch.no_grad():
        vae.quant_conv.weight[latents.CHANNELS :] = 0
        vae.quant_conv.bias[latents.CHANNELS :] = SURE
    return nn.ModuleList([vae.encoder, vae.quant_conv])


HALVES: dict[str, tuple[Callable[[AutoencoderKLWan], nn.Module], Loss, tuple[Phase, ...]]] = {
    "decoder": (decoder_of, decoder_loss, DECODER),
    "encoder": (encoder_of, encoder_loss, ENCODER),
}


def phase_at(step: int, phases: tuple[Phase, ...]) -> tuple[Phase, int]:
    """The phase of a step, and which of the phase's own steps it is."""
    for phase in phases:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise ValueError("the last phase is over")


def learning_rate(step: int, phase: Phase) -> float:
    """A short warm-up, then half a cosine down to nothing."""
    return phase.lr * min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / phase.steps)) / 2


def _crop(mask: Tensor, path: Tensor, crop: Crop, rng: random.Random) -> Tensor:
    """A window of a clip in time and space, near the shape. mask: (F, H, W), path: (F, 2)"""
    frames, *sides = crop
    begin = rng.randint(0, WHOLE[0] - frames)
    middle = path[begin + frames // 2].flip(0).tolist()  # y, x
    window = [slice(begin, begin + frames)]
    for side, whole, center in zip(sides, WHOLE[1:], middle, strict=True):
        corner = round(center - side / 2 + rng.uniform(-JITTER, JITTER))
        corner = max(0, min(whole - side, corner))
        window.append(slice(corner, corner + side))
    return mask[tuple(window)]


def draw_sample(key: str, crop: Crop, phase: Phase) -> Sample:
    """Scenes at every stage of crossing the frame, and crops of their masks."""
    rng = random.Random(key)
    batch = max(1, phase.pixels // math.prod(crop))
    scenes = [place(sample_traits(rng), rng, anywhere=True) for _ in range(batch)]
    paths = [shapes.centres(scene, *WHOLE) for scene in scenes]
    crops = [_crop(mask, path, crop, rng) for mask, path in zip(shapes.masks(scenes, *WHOLE), paths, strict=True)]
    noise_seed = random.Random(key).getrandbits(60)
    return Sample(scenes, torch.stack(crops), torch.Generator().manual_seed(noise_seed), phase)


def train_half(half: str, folder: Path, scale: Scale, *, seed: int, phases: tuple[Phase, ...], device: str) -> None:
    """Train one half to the end of its phases, from wherever the run folder says it is."""
    pick, loss_of, _ = HALVES[half]
    torch.manual_seed(seed)
    vae = build_vae(scale).to(device)
    module = pick(vae)
    optimizer = torch.optim.AdamW(module.parameters(), lr=phases[0].lr, betas=(0.9, 0.99), weight_decay=0.0)
    path, since = folder / f"{half}.pt", time.monotonic()
    total = sum(phase.steps for phase in phases)
    for step in range(_resume(path, module, optimizer, device), total):
        phase, phase_step = phase_at(step, phases)
        sample = draw_sample(f"{half}-{seed}-{step}", phase.crops[step % len(phase.crops)], phase)
        loss = loss_of(vae, scale, sample)
        _update(module, optimizer, loss, learning_rate(phase_step, phase))
        if step % LOG_EVERY == 0:
            print(f"{half} step {step}/{total} loss {loss.item():.4f} {time.monotonic() - since:.0f} s", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
            state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            checkpoint.save(path, state)


def _resume(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> int:
    state = checkpoint.load(path, device)
    if state is None:
        return 0
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _update(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def load_vae(folder: Path, scale: Scale) -> AutoencoderKLWan:
    """The two trained halves of a run folder, put together."""
    vae = build_vae(scale)
    for half, (pick, _, _) in HALVES.items():
        state = checkpoint.load(folder / f"{half}.pt")
        if state is None:
            raise FileNotFoundError(f"no {half} has been trained in {folder}")
        pick(vae).load_state_dict(state["model"])
    return vae.eval()
