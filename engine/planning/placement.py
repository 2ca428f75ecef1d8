"""The memory plan: where the weights are while a job runs, and what that costs in memory and time.

Pure arithmetic on the catalogue's bytes, which needs no GPU; `engine.gpu.load.offloading` carries a Plan out. The
estimates are rules of thumb, good to about a third; each constant says where it comes from.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product

from engine.catalog.models import Model
from engine.job import EngineError, Job
from engine.planning.machine import GIB, Machine
from engine.planning.work import Parts, Shape, Work, forward_flops

TILES = {1: 512, 2: 256, 3: 128}  # vae_config → side of a VAE tile in pixels
_ENCODERS = {"card": "on the card", "streamed": "streamed by layer", "swapped": "on the card while they work"}


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model are while it works."""

    denoisers: str  # resident, streamed by block, swapped (on the card only while they work) or sequential, by layer
    encoders: str  # card, streamed (layer by layer while they work) or swapped
    pinned: bool = False  # the denoisers stream from pinned RAM, not from the mapped files
    encoders_pinned: bool = False
    fill: bool = False  # as many blocks as fit stay on the card
    tile_side: int = 0  # of the VAE, in pixels; 0: whole frames
    quantization: str = "none"

    @property
    def name(self) -> str:
        """resident, streamed, swapped or sequential; with `quantized` or `quantized_` before it for 8-bit weights."""
        if self.quantization == "none":
            return self.denoisers
        return "quantized" if self.denoisers == "resident" else f"quantized_{self.denoisers}"


RESIDENT = (
    Placement("resident", "card"),
    Placement("resident", "streamed", encoders_pinned=True),
    Placement("resident", "streamed"),
)
STREAMED = tuple(Placement("streamed", "streamed", *pinned) for pinned in product((True, False), (True, False)))
PINNED, MAPPED = STREAMED[:2], STREAMED[3:]
FILLED = tuple(replace(choice, fill=True) for choice in STREAMED)
SWAPPED = (Placement("swapped", "swapped"),)
SEQUENTIAL = (Placement("sequential", "streamed"),)
# What each profile may do; the fastest that fits is chosen.
PROFILES: Mapping[float, tuple[Placement, ...]] = {
    0: (*RESIDENT, *FILLED, *SWAPPED, *SEQUENTIAL),
    1: RESIDENT,
    2: PINNED,
    3: SWAPPED,
    3.5: SWAPPED,
    4: (*PINNED, *MAPPED),
    4.5: MAPPED,
    5: SEQUENTIAL,
}

# ---- memory

# transformer_quantization → bytes of a weight against bf16, with the scales and the layers left alone.
QUANTIZED = {"none": 1.0, "int8": 0.52, "fp8": 0.52, "nf4": 0.3, "gguf": 0.55}
QUANTIZED_SLOWDOWN = 1.05  # weights are widened before each product
DOUBT = 1.25  # an estimate this much too large is still tried: refusing a job that would have run is worse
RESERVE_BYTES = GIB // 2  # libraries' workspaces
FRAGMENTATION = 1.05  # what the allocator holds beyond what is asked of it
PROCESS_RAM_BYTES = 3 * GIB  # the worker with torch, diffusers and the CUDA context
PINNED_ROUNDING = 1.5  # torch rounds each pinned tensor up to a power of two: 43 GB for the 28.6 of Wan 14B

# Counted on meta tensors of the published shapes, diffusers 0.42.1: 30 (SDXL) to 69 (Z-Image), 44-56 for Wan and LTX.
ACTIVATION_BYTES = 56  # of a token, for each unit of the cube root of the denoiser's parameters
SOUND_DECODE_BYTES = GIB
OUTPUT_BYTES = 36  # of a pixel of a finished frame: three channels in float32, three times
ENCODER_BYTES = GIB // 3  # an encoder's activations
STREAMED_SHARE = 0.25  # of an encoder or VAE that is on the card at once: the largest table, and the next layer
LAYER_SHARE = 0.04  # of a denoiser: its largest layer, and the next one
BLOCKS_AHEAD = 3  # on the card at once: at work, coming, and not yet given back
FEWEST_BLOCKS = 12  # a denoiser's blocks are cube root of parameters / 60, at least these

# ---- time

LEAST_S = 10.0  # a job that takes less by the plan is mostly overheads, which it does not count
EFFICIENCY = 0.55  # of a card's measured matrix product; diffusers reaches 0.43 of an H100's, 0.65 of a 4090's
TEAM_EFFICIENCY = 0.9  # of devices that compute a forward together; the rest is communication
STREAM_OVERHEAD = (0.02, 0.015)  # of a step whose blocks come in time: of the first one, of all (published: 3-4%)
PAGEABLE_BYTES_PER_S = 3e9  # copies of whole parts from memory that is not pinned (published: 1-3)
MAPPED_BYTES_PER_S = 8e9  # layers pinned on their way, as published for Flux; at most a third of the link's speed
DISK_BYTES_PER_S = 1.5e9  # mapped weights for which RAM is too small are read from the disk again and again
SEQUENTIAL_VAE = 6.8  # a VAE that is streamed by layers, measured
PROMPT_TOKENS = 512
DECODE_FLOPS = 10e6  # of a pixel of a frame: 8.5 for Wan's VAE, 9.5 for Stable Diffusion's, 18 for Wan 2.2's
USUAL_VAE_BYTES = 160e6  # a smaller one (the embedded model's) is quicker in proportion
FLOAT32_SHARE = 1 / 6  # of the speed in bf16; a half on a 4090, 1/7 on an H100, 1/9 on an A100
TILED_DECODE = {0: 1.0, 512: 1.8, 256: 1.9, 128: 2.0}  # tiles overlap by a quarter a side: 16/9 of the pixels
SAVED_VOXELS_PER_S = 40e6  # x264 veryfast: 0.4-0.8 s for 832x480 with 81 frames


def streamed_blocks(sizes: Sequence[int], room_bytes: int) -> list[int]:
    """The fewest blocks to stream, by index, so that the others take at most `room_bytes`."""
    # Evenly spread: the work of the blocks between two of them hides the copy.
    spread = ([place * len(sizes) // count for place in range(count)] for count in range(len(sizes) + 1))
    return next(places for places in spread if sum(sizes) - sum(sizes[place] for place in places) <= max(0, room_bytes))


@dataclass(frozen=True)
class Plan:
    """Where everything is during a job, and what to expect."""

    placement: Placement
    resident_bytes: int  # of the denoisers, that stay on the card
    streamed_bytes: int  # of the denoisers, that are copied for every forward
    peak_vram_bytes: int
    ram_bytes: int  # that can't be given back while the model is loaded; the system may drop mapped weights
    step_s: float
    job_s: float
    card_bytes: int  # free on the card when it was made; 0: no card
    fits: bool = True  # False: by the estimate it is too large, and it is tried all the same
    cards: int = 1  # that compute each forward together; the bytes are those of one of them

    def describe(self) -> str:
        """The plan in one line."""
        where, side = f"everything in RAM, about {_gib(self.ram_bytes)}", self.placement.tile_side
        if self.card_bytes:
            denoisers = self.placement.name.replace("_", " and ")
            if self.placement.denoisers == "streamed":
                source = "pinned RAM" if self.placement.pinned else "mapped files"
                denoisers += f" ({_gib(self.streamed_bytes)} from {source}, {_gib(self.resident_bytes)} stay)"
            where = (
                f"denoiser {denoisers}, encoders {_ENCODERS[self.placement.encoders]},"
                f" VAE {f'in tiles of {side} pixels' if side else 'on whole frames'}; about"
                f" {_gib(self.peak_vram_bytes)} of GPU memory{'' if self.fits else ', more than is free'},"
                f" {_gib(self.ram_bytes)} of RAM"
            )
        together = f"{self.cards} devices together, each: " if self.cards > 1 else ""
        return f"{together}{where}; about {self.step_s:.3g} s a step, {self.job_s:.3g} s a job"


@dataclass(frozen=True)
class Estimate:
    """What a job will need."""

    memory_bytes: int  # the most at once, of the card, or of RAM without one
    seconds: float | None  # once the model is loaded; None for a short job, whose overheads are not in the plan
    plan: str  # one line: where the weights will be


def estimate(
    model: Model, job: Job, machines: Iterable[Machine], *, profile: float, quantization: str, vae_config: int
) -> Estimate | None:
    """What `job` will need on the machine where it is fastest; None without any. Raises the EngineError of `plan`."""
    work, plans = Work.of(model, job), list[Plan]()
    refusal: EngineError | None = None
    for machine in machines:
        try:
            plans.append(plan(model, work, machine, profile=profile, quantization=quantization, vae_config=vae_config))
        except EngineError as error:
            refusal = refusal or error
    if fastest := min(plans, key=lambda found: found.job_s, default=None):
        memory_bytes = fastest.peak_vram_bytes if fastest.card_bytes else fastest.ram_bytes
        seconds = round(fastest.job_s, 1) if fastest.job_s >= LEAST_S else None
        return Estimate(memory_bytes, seconds, fastest.describe())
    if refusal:
        raise refusal
    return None


def plan(
    model: Model,
    work: Work,
    machine: Machine,
    *,
    profile: float = 0,
    quantization: str = "none",
    vae_config: int = 0,
    parts: Parts | None = None,
) -> Plan:
    """The fastest plan that fits `machine` under `profile` (1 to 5 as in WanGP, 0: any).

    `quantization` is a key of QUANTIZED, or "auto": 8-bit weights where they are faster. `vae_config` is a key of
    TILES, or 0: any. `parts` are the weights that were found, else the catalogue's. Where nothing fits, the plan that
    needs least memory comes back if a profile was demanded or the estimate may be wrong; else EngineError is raised.
    """
    machine = machine if model.context_parallel else replace(machine, cards=1)
    in_ram = Placement("resident", "card", quantization=quantization if quantization in QUANTIZED else "none")
    choices = _placements(profile, quantization, vae_config) if machine.free_vram_bytes else (in_ram,)
    weights, shape = parts or Parts.of(model), Shape.of(model)
    plans = [_Costs(weights, shape, work, machine, choice).plan() for choice in choices]
    if fitting := [candidate for candidate in plans if candidate.fits]:
        return min(fitting, key=lambda candidate: (candidate.job_s, candidate.peak_vram_bytes))
    least = min(plans, key=lambda candidate: (candidate.peak_vram_bytes, candidate.ram_bytes))
    too_large = max(least.peak_vram_bytes / machine.free_vram_bytes, least.ram_bytes / max(1, machine.free_ram_bytes))
    if profile or too_large <= DOUBT:
        return least
    raise EngineError(_refusal(model, work, machine, least), "out_of_memory")


def serves(current: Plan, model: Model, work: Work, parts: Parts | None = None) -> bool:
    """True if a model that is placed by the plan `current` can run `work` too."""
    machine = Machine(current.card_bytes, 0)
    costs = _Costs(parts or Parts.of(model), Shape.of(model), work, machine, current.placement)
    room_bytes = max(current.card_bytes, current.peak_vram_bytes)
    return not current.card_bytes or costs.peak_bytes(current.resident_bytes) <= room_bytes


@cache
def _placements(profile: float, quantization: str, vae_config: int) -> tuple[Placement, ...]:
    sides = (TILES[vae_config],) if vae_config else (0, *TILES.values())  # 0: whole frames
    kinds = ("none", "int8") if quantization == "auto" else (quantization,)
    choices = product(PROFILES[profile], sides, kinds)
    return tuple(replace(choice, tile_side=side, quantization=kind) for choice, side, kind in choices)


@dataclass(frozen=True)
class _Costs:
    """What one placement costs one job on one machine: the arithmetic."""

    parts: Parts
    shape: Shape
    work: Work
    machine: Machine
    placement: Placement

    def plan(self) -> Plan:
        card, ram = self.machine.free_vram_bytes, self._ram_bytes
        peak = self.peak_bytes(self._resident_bytes) if card else 0
        fits = not card or (peak <= card and ram <= self.machine.free_ram_bytes)
        sizes = (self._resident_bytes, self._streamed_bytes, peak, ram)
        return Plan(self.placement, *sizes, self._step_s, self._job_s(), card, fits, self.machine.cards)

    def peak_bytes(self, resident_bytes: int) -> int:
        """The most memory of the card at once, with `resident_bytes` of the denoisers there throughout."""
        return round(FRAGMENTATION * self._most_bytes(resident_bytes)) + RESERVE_BYTES

    def _most_bytes(self, resident_bytes: int) -> float:
        encoding, denoising, decoding = self._weights_bytes(resident_bytes)
        return max(encoding + ENCODER_BYTES, denoising + self._activation_bytes(), decoding + self._decode_bytes())

    def _weights_bytes(self, resident_bytes: int) -> tuple[float, float, float]:
        """Weights on the card while encoding, denoising, decoding."""
        parts, one = self.parts, self._denoisers_bytes / self.parts.denoiser_count
        if self.placement.denoisers == "swapped":
            return parts.encoders, one, parts.vae
        if self.placement.denoisers == "sequential":
            return parts.encoders * STREAMED_SHARE, one * LAYER_SHARE, parts.vae * STREAMED_SHARE
        encoders = parts.encoders if self.placement.encoders == "card" else 0
        stays = resident_bytes + parts.vae + encoders
        comes = (parts.encoders - encoders) * STREAMED_SHARE
        blocks = 0.0  # that are on the card only for a moment; layers, if they come from mapped files
        if self.placement.pinned:
            blocks = BLOCKS_AHEAD * one / max(FEWEST_BLOCKS, math.pow(parts.parameters, 1 / 3) / 60)
        elif self.placement.denoisers == "streamed":
            blocks = one * LAYER_SHARE
        return stays + comes, stays + blocks, stays + blocks / BLOCKS_AHEAD

    @cached_property
    def _denoisers_bytes(self) -> int:
        return round(self.parts.denoisers * QUANTIZED[self.placement.quantization] / QUANTIZED[self.parts.quantization])

    @cached_property
    def _resident_bytes(self) -> int:
        if self.placement.denoisers == "resident":
            return self._denoisers_bytes
        if not self.placement.fill:
            return 0
        room = (self.machine.free_vram_bytes - RESERVE_BYTES) / FRAGMENTATION - self._most_bytes(0)
        return max(0, min(int(room), self._denoisers_bytes))

    @property
    def _streamed_bytes(self) -> int:
        return self._denoisers_bytes - self._resident_bytes

    def _activation_bytes(self) -> float:
        together = self.work.batch * (self.work.passes if self.work.joined else 1)  # results that one forward carries
        tokens = self.work.tokens * together / self.machine.cards
        return ACTIVATION_BYTES * tokens * math.pow(self.parts.parameters, 1 / 3)

    def _decode_bytes(self) -> float:
        work, shape, side = self.work, self.shape, self.placement.tile_side
        if not work.frames:
            return SOUND_DECODE_BYTES
        pixels = min(work.width, side or work.width) * min(work.height, side or work.height) * work.batch
        activations = self.parts.vae_width * pixels * (shape.frame_bytes + shape.voxel_bytes * work.frames)
        return activations + OUTPUT_BYTES * work.voxels

    @cached_property
    def _ram_bytes(self) -> int:
        if not self.machine.free_vram_bytes:
            weights = self._denoisers_bytes + self.parts.encoders + self.parts.vae
            return PROCESS_RAM_BYTES + weights + round(max(self._activation_bytes(), self._decode_bytes()))
        pinned = self._streamed_bytes * self.placement.pinned + self.parts.encoders * self.placement.encoders_pinned
        changed = 0 if self.placement.pinned or not self.parts.changed else self.parts.denoisers
        return PROCESS_RAM_BYTES + max(round(PINNED_ROUNDING * pinned), changed)

    @cached_property
    def _mapped_rate(self) -> float:
        """Bytes a second from the mapped files, or from the disk itself where RAM does not hold them."""
        in_ram = self.placement.pinned or self.parts.changed
        mapped = self._streamed_bytes * (not in_ram) + self.parts.encoders * (not self.placement.encoders_pinned)
        if self._ram_bytes + mapped > self.machine.free_ram_bytes:
            return min(DISK_BYTES_PER_S, self.machine.link_bytes_per_s)
        most = PAGEABLE_BYTES_PER_S if self.placement.denoisers == "swapped" else MAPPED_BYTES_PER_S
        return min(most, self.machine.link_bytes_per_s / 3)

    @cached_property
    def _step_s(self) -> float:
        """Seconds of a denoising step. Copies from pinned memory hide behind the arithmetic, others add to it."""
        speed = self.machine.flops_per_s * EFFICIENCY
        one = forward_flops(self.parts.parameters, self.work.tokens, self.shape.work) / speed
        slowdown = QUANTIZED_SLOWDOWN if self.placement.quantization != "none" else 1.0
        shared = 1 / (self.machine.cards * TEAM_EFFICIENCY) if self.machine.cards > 1 else 1.0
        compute_s = one * self.work.passes * self.work.batch * slowdown * shared
        if self.placement.denoisers in ("resident", "swapped"):
            return compute_s
        forwards = 1 if self.work.joined else self.work.passes
        moved = forwards * self._streamed_bytes / self.parts.denoiser_count
        first, share = STREAM_OVERHEAD
        if self.placement.pinned:
            overhead = 1 + first + share * self._streamed_bytes / max(1, self._denoisers_bytes)
            return max(compute_s, moved / self.machine.link_bytes_per_s) * overhead
        return compute_s * (1 + first + share) + moved / self._mapped_rate

    def _job_s(self) -> float:
        work = self.work
        rate = self.machine.link_bytes_per_s if self.placement.encoders_pinned else self._mapped_rate
        copies = {"card": 0, "streamed": work.passes * self.shape.encoder_runs, "swapped": 2}
        copies_s = copies[self.placement.encoders] * self.parts.encoders / rate
        encode_s = work.passes * self.parts.encoders * PROMPT_TOKENS / self.machine.flops_per_s + copies_s
        swaps_s = 2 * self._denoisers_bytes / self._mapped_rate if self.placement.denoisers == "swapped" else 0
        denoise_s = work.steps * work.sections * self._step_s
        save_s = work.voxels / SAVED_VOXELS_PER_S
        return work.runs * (encode_s + swaps_s + denoise_s + self._decode_s() + save_s)

    def _decode_s(self) -> float:
        work, side = self.work, self.placement.tile_side
        slower = self.parts.vae_width > 1 and self.machine.free_vram_bytes  # a CPU was measured in float32
        rate = self.machine.flops_per_s * EFFICIENCY * (FLOAT32_SHARE if slower else 1)
        tiled = TILED_DECODE[side] if max(work.width, work.height) > side else 1.0
        layered = SEQUENTIAL_VAE if self.placement.denoisers == "sequential" else 1.0
        size = min(1.0, self.parts.vae / (self.parts.vae_width * USUAL_VAE_BYTES))
        return size * DECODE_FLOPS * work.voxels / rate * tiled * layered


def _refusal(model: Model, work: Work, machine: Machine, least: Plan) -> str:
    if least.ram_bytes > machine.free_ram_bytes:
        return (
            f"model: '{model.id}' needs about {_gib(least.ram_bytes)} of RAM, and {_gib(machine.free_ram_bytes)} are"
            " free. End other programs, or choose a smaller model."
        )
    size = f"{work.width}x{work.height} with {work.frames} frames" if work.frames else "this length"
    return (
        f"model: '{model.id}' needs about {_gib(least.peak_vram_bytes)} of GPU memory for {size}, even with its"
        f" weights streamed in layer by layer, and {_gib(machine.free_vram_bytes)} are free. Ask for a smaller"
        " resolution, fewer frames or batch_size 1, or choose a smaller model."
    )


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
