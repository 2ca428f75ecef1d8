"""The transformer and its text encoder, by flow matching on the hand-made latents.

A stage differs from the next in its noise levels, its learning rate and its clip sizes. Direction and background are
decided almost at pure noise, so a high flow shift teaches them; edges and corners are decided late, so a low one, with
the learning rate going down, teaches shape.
"""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint, latents, ranks, shapes
from .captions import build_tokenizer, sample_captioned
from .latents import Scale
from .models import build_text_encoder, build_transformer
from .muon import Muon
from .prompting import Prompter
from .scene import place

Clip = tuple[int, int, int]  # frames, height, width

SQUARE: Clip = (17, 64, 64)
MIXED: dict[Clip, float] = {
    SQUARE: 0.70,
    (17, 64, 96): 0.08,
    (17, 96, 64): 0.05,
    (33, 64, 64): 0.06,
    (33, 64, 96): 0.08,
    (9, 64, 64): 0.03,
}
MOSTLY_SQUARE: dict[Clip, float] = {**MIXED, SQUARE: 1.4}
OFTEN_LONG: dict[Clip, float] = {**MIXED, SQUARE: 0.8, (33, 64, 64): 0.3, (33, 64, 96): 0.12}

IMAGE_SHARE = 0.27  # of the steps are image-to-video


@dataclass(frozen=True)
class Stage:
    """`batch` clips of the square size a shard (longer and wider ones come in fewer), `plain` of them captioned in the
    plainest form; `rates` is the learning rate at both ends, as a share of the full one. `image` of the steps are
    image-to-video; of what moves, `slow` is slow, and twice that in those steps."""

    name: str
    steps: int
    flow_shift: float
    batch: int = 24
    plain: float = 0.2
    rates: tuple[float, float] = (1.0, 1.0)
    clips: dict[Clip, float] | None = None
    slow: float = 0.0
    image: float = IMAGE_SHARE


STAGES = (
    Stage("warm-up", 600, flow_shift=5, batch=16, plain=0.7),
    Stage("direction", 1100, flow_shift=8, plain=0.4),
    Stage("direction, faster", 300, flow_shift=8, rates=(1.5, 1.3)),
    Stage("shape", 800, flow_shift=4, rates=(1.3, 0.02), clips=MIXED),
    Stage("second round", 500, flow_shift=5, rates=(1.3, 0.02), clips=MIXED),
    Stage("direction again", 250, flow_shift=8, rates=(1.2, 1.2)),
    Stage("shape again", 1000, flow_shift=3, rates=(1.2, 0.02), clips=MIXED),
    Stage("larger shapes", 1350, flow_shift=3, plain=0.5, rates=(1.4, 0.26), clips=MOSTLY_SQUARE),
    Stage("three sizes", 1500, flow_shift=2.5, plain=0.6, rates=(0.9, 0.01), clips=MOSTLY_SQUARE),
    Stage("slowly", 250, flow_shift=5, plain=0.5, rates=(0.8, 0.8), clips=OFTEN_LONG, slow=0.25, image=0.4),
    Stage("slowly, shape", 600, flow_shift=2.5, plain=0.6, rates=(0.8, 0.01), clips=OFTEN_LONG, slow=0.25, image=0.4),
    Stage("slowly again", 350, flow_shift=3.5, plain=0.6, rates=(0.9, 0.01), clips=OFTEN_LONG, slow=0.25, image=0.33),
)
QUICK_STAGES = (Stage("quick", 4, flow_shift=5, batch=4, clips=MIXED),)

CONDITION_NOISE = 0.05  # the encoder's latents are not quite the hand-made ones
DECODED_NOISE = 0.17  # at most, by fineness: a frame that the decoder made, and that a window goes on from, is softer
MUON_LR, ADAM_LR = 0.01, 2e-3
WARMUP_STEPS = 50
EMA_DECAY = 0.997
TIMESTEPS = 1000
SAVE_EVERY, LOG_EVERY = 100, 50
NOISE_BANDS = (0.0, 0.5, 0.9, 0.97, 1.0)


class Student(nn.Module):
    """The two networks that train together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer()

    def optimizers(self) -> tuple[Muon, torch.optim.AdamW]:
        """Muon for the matrices of the blocks, AdamW for the rest."""
        matrices = [param for param in self.transformer.blocks.parameters() if param.ndim == 2]
        chosen = set(matrices)
        rest = [param for param in self.parameters() if param not in chosen]
        return Muon(matrices, MUON_LR), torch.optim.AdamW(rest, ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0)


@dataclass(frozen=True)
class Batch:
    """clean: (N, 16, k+1, h, w) normalized latents; with `image`, their first frame is given and not generated."""

    clean: Tensor
    captions: list[str]
    image: bool


def stage_at(step: int, stages: tuple[Stage, ...]) -> tuple[Stage, float]:
    """The stage of a step and how far through it is, 0 to 1."""
    for stage, end in zip(stages, itertools.accumulate(stage.steps for stage in stages), strict=True):
        if step < end:
            return stage, (step - end + stage.steps) / stage.steps
    raise ValueError(f"step {step} is after the last stage")


def rate_at(step: int, stages: tuple[Stage, ...]) -> float:
    """The share of the full learning rate."""
    stage, progress = stage_at(step, stages)
    first, last = stage.rates
    return (first + (last - first) * progress) * min(1, (step + 1) / WARMUP_STEPS)


def sample_batch(scale: Scale, stage: Stage, step_seed: str, shard: int) -> Batch:
    """Shards of a step share its clip size and kind, so that no process waits for another."""
    clips = stage.clips or {SQUARE: 1.0}
    shared = random.Random(step_seed)
    clip = shared.choices(list(clips), list(clips.values()))[0]
    image = shared.random() < stage.image
    rng = random.Random(f"{step_seed}-{shard}")
    count = max(1, round(stage.batch * _tokens(SQUARE) / _tokens(clip)))
    pairs = [sample_captioned(rng, stage.plain, stage.slow * (1 + image)) for _ in range(count)]
    scenes = [place(traits, rng, anywhere=image and rng.random() < 0.6) for traits, _ in pairs]
    clean = scale.normalize(latents.encode(scenes, shapes.masks(scenes, *clip)))
    return Batch(clean, [caption for _, caption in pairs], image)


def _tokens(clip: Clip) -> int:
    frames, height, width = clip
    return (frames // 4 + 1) * (height // 16) * (width // 16)


def sample_sigmas(count: int, flow_shift: float, rng: torch.Generator) -> Tensor:
    """One noise level from each of `count` equal shares of the schedule: (count,) in (0, 1)."""
    even = (torch.arange(count) + torch.rand(count, generator=rng)) / count
    return flow_shift * even / (1 + (flow_shift - 1) * even)


def _noised(batch: Batch, noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the transformer sees: the latents between clean and noise, and their timesteps."""
    level = sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * batch.clean + level * noise
    if not batch.image:
        return noisy, sigmas * TIMESTEPS
    given = batch.clean[:, :, :1]
    spread = CONDITION_NOISE + DECODED_NOISE * torch.rand(len(given), 1, generator=rng) * latents.FINENESS
    noisy[:, :, :1] = given + spread[:, :, None, None, None] * torch.randn(given.shape, generator=rng)
    return noisy, _image_timesteps(sigmas * TIMESTEPS, batch.clean)


def _image_timesteps(timesteps: Tensor, clean: Tensor) -> Tensor:
    """A timestep a token, zero for those of the given frame: (N, tokens)."""
    frames, patches = clean.shape[2], clean.shape[3] * clean.shape[4] // 4
    started = (torch.arange(frames) > 0).repeat_interleave(patches)
    return timesteps[:, None] * started


class Monitor:
    """Mean error by band of noise: what is hard shows where, long before a sample looks like anything."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.bands: list[list[float]] = [[] for _ in NOISE_BANDS[1:]]

    def add(self, sigmas: Tensor, errors: Tensor) -> None:
        for sigma, error in zip(sigmas.tolist(), errors.tolist(), strict=True):
            band = sum(sigma > edge for edge in NOISE_BANDS[1:-1])
            self.bands[band].append(error)

    def report(self, step: int, stage: str) -> str:
        means = " ".join(f"{sum(band) / max(1, len(band)):.4f}" for band in self.bands)
        self.bands = [[] for _ in NOISE_BANDS[1:]]
        return f"flow step {step} {stage}: {means} ({time.monotonic() - self.since:.0f} s)"


class Training:
    """A student with its optimisers and its moving average; everything a checkpoint holds."""

    def __init__(self, folder: Path, scale: Scale, stages: tuple[Stage, ...], seed: int, device: str) -> None:
        self.path, self.scale, self.stages, self.seed, self.device = folder / "flow.pt", scale, stages, seed, device
        torch.manual_seed(seed)
        self.student = Student().to(device)
        self.params = list(self.student.parameters())
        self.average = [param.detach().clone() for param in self.params]
        self.prompter = Prompter(self.student.tokenizer, self.student.text_encoder, self.student.transformer)
        self.optimizers = self.student.optimizers()
        self.full_rates = (MUON_LR, ADAM_LR)
        self.step = 0
        self.monitor = Monitor()

    def resume(self) -> None:
        """Go on from the run folder's checkpoint, if it has one."""
        state = checkpoint.load(self.path, self.device)
        if state is None:
            return
        self.student.load_state_dict(state["student"])
        self.average, self.step = state["average"], state["step"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save(self) -> None:
        """Everything that `resume` needs."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"student": self.student.state_dict(), "average": self.average, "optimizers": optimizers}
        checkpoint.save(self.path, {**state, "step": self.step})

    def advance(self) -> None:
        """One step."""
        self._set_rates()
        for shard in ranks.own_shards():
            self._backward(shard)
        ranks.sum_gradients(self.params)
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._follow()
        self.step += 1

    def _backward(self, shard: int) -> None:
        stage, _ = stage_at(self.step, self.stages)
        step_seed = f"flow-{self.seed}-{self.step}"
        batch = sample_batch(self.scale, stage, step_seed, shard)
        rng = torch.Generator().manual_seed(random.Random(f"{step_seed}-{shard}-levels").getrandbits(60))
        sigmas = sample_sigmas(len(batch.clean), stage.flow_shift, rng)
        errors = self._velocity_errors(batch, sigmas, f"{step_seed}-{shard}-noise")
        (errors.mean() / ranks.SHARDS).backward()
        self.monitor.add(sigmas, errors.detach())

    def _velocity_errors(self, batch: Batch, sigmas: Tensor, seed: str) -> Tensor:
        """The squared error of each clip's predicted velocity: (N,)."""
        rng = torch.Generator().manual_seed(random.Random(seed).getrandbits(60))
        noise = torch.randn(batch.clean.shape, generator=rng)
        noisy, timesteps = _noised(batch, noise, sigmas, rng)
        text = self.prompter(batch.captions, random.Random(seed))
        guess = self.student.transformer(noisy.to(self.device), timesteps.to(self.device), text, return_dict=False)[0]
        errors = (guess - (noise - batch.clean).to(self.device)).square()
        return errors[:, :, int(batch.image) :].flatten(1).mean(1)

    def _set_rates(self) -> None:
        share = rate_at(self.step, self.stages)
        for optimizer, full in zip(self.optimizers, self.full_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = full * share

    @torch.no_grad()
    def _follow(self) -> None:
        """The average lags less while it is young."""
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [param.data for param in self.params], 1 - decay)


def train(folder: Path, scale: Scale, stages: tuple[Stage, ...], seed: int, device: str) -> None:
    """Train to the end of the last stage; call it through `ranks.launch` to use several processes."""
    training = Training(folder, scale, stages, seed, device)
    training.resume()
    total = sum(stage.steps for stage in stages)
    while training.step < total:
        stage, _ = stage_at(training.step, stages)
        training.advance()
        if ranks.is_first() and training.step % LOG_EVERY == 0:
            print(training.monitor.report(training.step, stage.name), flush=True)
        if ranks.is_first() and (training.step % SAVE_EVERY == 0 or training.step == total):
            training.save()


def load_average(folder: Path) -> Student:
    """The averaged networks of a run folder, which are the ones to ship."""
    state = checkpoint.load(folder / "flow.pt")
    if state is None:
        raise FileNotFoundError(f"no transformer has been trained in {folder}")
    student = Student()
    with torch.no_grad():
        for param, value in zip(student.parameters(), state["average"], strict=True):
            param.copy_(value)
    return student.eval()
