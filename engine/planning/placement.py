"""The memory plan: where the weights live while a job runs, and what that will cost in memory and time.

Pure arithmetic on the catalogue's bytes, so that the daemon can ask it without a GPU; `engine.gpu.memory` carries a
Plan out. The estimates are rules of thumb, good to about a third; each constant says where it comes from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from engine.catalog.models import Model
from engine.job import EngineError
from engine.planning.machine import GIB, Machine
from engine.planning.work import Parts, Shape, Work, forward_flops, power

GB = 10**9

# ---- what each profile may do; 0 chooses the fastest of all that fit

# vae_config → side of a VAE tile in pixels; 0 chooses.
TILES = {1: 512, 2: 256, 3: 128}
TILE_SIDES = (0, *TILES.values())  # 0: whole frames


@dataclass(frozen=True)
class Way:
    """One way to place a model.

    `placement` is about the denoisers: resident, streamed (block by block during each step), swapped (each part comes
    whole when it is its turn) or sequential (layer by layer, and the VAE too). `encoders` are on the card, streamed
    (layer by layer while they work) or swapped. What streams comes from pinned RAM or from the mapped files. `fill`
    keeps as many blocks on the card as fit.
    """

    placement: str
    encoders: str
    pinned: bool = False
    encoders_pinned: bool = False
    fill: bool = False
    tile_side: int = 0
    quantization: str = "none"


RESIDENT = (
    Way("resident", "card"),
    Way("resident", "streamed", encoders_pinned=True),
    Way("resident", "streamed"),
)
SWAPPED = (Way("swapped", "swapped"),)
PINNED = (Way("streamed", "streamed", pinned=True, encoders_pinned=True), Way("streamed", "streamed", pinned=True))
MAPPED = (Way("streamed", "streamed"),)
FILLED = tuple(
    Way("streamed", "streamed", pinned, encoders_pinned, fill=True)
    for pinned, encoders_pinned in product((True, False), repeat=2)
)
SEQUENTIAL = (Way("sequential", "streamed"),)
PROFILES: Mapping[float, tuple[Way, ...]] = {
    0: (*RESIDENT, *FILLED, *SWAPPED, *SEQUENTIAL),
    1: RESIDENT,
    2: PINNED,
    3: SWAPPED,
    3.5: SWAPPED,
    4: (*PINNED, *MAPPED),
    4.5: MAPPED,
    5: SEQUENTIAL,
}

# ---- what the parts of a model take

# transformer_quantization → bytes of a weight against bf16; the scales and the layers left alone are counted in.
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
ENCODER_BYTES = GIB // 3  # what an encoder computes in
STREAMED_ENCODER = 0.25  # share of an encoder that is there at once: its embedding table, and the layer to come
LAYER_SHARE = 0.04  # of a denoiser: its largest layer, and the one to come
BLOCKS_AHEAD = 3  # on the card at once: at work, coming, and not yet given back
FEWEST_BLOCKS = 12  # a denoiser's blocks are cube root of parameters / 60, at least these


# ---- what takes time

EFFICIENCY = 0.55  # of a card's measured matrix product; diffusers reaches 0.43 of an H100's, 0.65 of a 4090's
TEAM_EFFICIENCY = 0.9  # of devices that compute a forward together; the rest is what they tell each other
STREAM_OVERHEAD = (0.02, 0.015)  # of a step whose blocks come in time: of the first one, of all (published: 3-4%)
PAGEABLE_BYTES_PER_S = 3 * GB  # copies of whole parts from memory that is not pinned (published: 1-3)
MAPPED_BYTES_PER_S = 8 * GB  # layers pinned on their way, as published for Flux; at most a third of the link's speed
DISK_BYTES_PER_S = 1.5 * GB  # mapped weights for which RAM is too small are read from the disk again and again
SEQUENTIAL_VAE = 6.8  # a VAE that is streamed by layers, measured
PROMPT_TOKENS = 512
DECODE_FLOPS = 10e6  # of a pixel of a frame: 8.5 for Wan's VAE, 9.5 for Stable Diffusion's, 18 for Wan 2.2's
USUAL_VAE_BYTES = 160e6  # a smaller one (the embedded model's) is quicker in proportion
FLOAT32_SHARE = 1 / 6  # of the speed in bf16; a half on a 4090, 1/7 on an H100, 1/9 on an A100
TILED_DECODE = {0: 1.0, 512: 1.8, 256: 1.9, 128: 2.0}  # tiles overlap by a quarter a side: 16/9 of the pixels
SAVED_VOXELS_PER_S = 40e6  # x264 veryfast: 0.4-0.8 s for 832x480 with 81 frames


def streamed_blocks(sizes: Sequence[int], room_bytes: int) -> list[int]:
    """The places of the blocks to stream, so that the others take at most `room_bytes`.

    They are as few as can be and evenly spread: between two of them lie others, whose work hides the copy.
    """
    for count in range(len(sizes) + 1):
        places = [place * len(sizes) // count for place in range(count)]
        if sum(sizes) - sum(sizes[place] for place in places) <= max(0, room_bytes):
            return places
    return list(range(len(sizes)))


@dataclass(frozen=True)
class Plan:
    """Where everything lives during a job, and what to expect.

    Of the denoisers `resident_bytes` stay on the card and `streamed_bytes` come anew with every forward. `ram_bytes`
    can't be given back while the model is loaded; mapped weights are not in it, the system may drop them. `fits` is
    False if the estimate says that it is too large, and it is tried all the same.
    """

    way: Way
    resident_bytes: int
    streamed_bytes: int
    peak_vram_bytes: int
    ram_bytes: int
    step_s: float
    job_s: float
    card_bytes: int  # free on the card when it was made; 0: no card
    fits: bool = True
    cards: int = 1  # that compute each forward together; the bytes are those of one of them

    @property
    def placement(self) -> str:
        """resident, streamed, swapped or sequential; with `quantized` or `quantized_` before it for 8-bit weights."""
        if self.way.quantization == "none":
            return self.way.placement
        return "quantized" if self.way.placement == "resident" else f"quantized_{self.way.placement}"

    def describe(self) -> str:
        """The plan in one line."""
        together = f"{self.cards} devices together, each: " if self.cards > 1 else ""
        return together + self._of_one()

    def _of_one(self) -> str:
        if not self.card_bytes:
            return f"everything in RAM, about {_gib(self.ram_bytes)}; {self._times()}"
        tiles = f"VAE in tiles of {self.way.tile_side} pixels" if self.way.tile_side else "VAE on whole frames"
        doubt = "" if self.fits else ", more than is free"
        return (
            f"{self._denoisers()}, encoders {_ENCODERS[self.way.encoders]}, {tiles}; about"
            f" {_gib(self.peak_vram_bytes)} of GPU memory{doubt}, {_gib(self.ram_bytes)} of RAM; {self._times()}"
        )

    def _denoisers(self) -> str:
        words = f"denoiser {self.placement.replace('_', ' and ')}"
        if self.way.placement != "streamed":
            return words
        source = "pinned RAM" if self.way.pinned else "mapped files"
        return f"{words} ({_gib(self.streamed_bytes)} from {source}, {_gib(self.resident_bytes)} stay)"

    def _times(self) -> str:
        return f"about {self.step_s:.3g} s a step, {self.job_s:.3g} s a job"


_ENCODERS = {
    "card": "on the card",
    "streamed": "streamed by layer",
    "swapped": "on the card while they work",
}


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

    `quantization` is a key of QUANTIZED, or "auto": 8-bit weights where they are faster. `parts` are the weights as
    they were found, else the catalogue's. Where nothing fits, the least is returned (`fits` is False) if a profile was
    demanded or the estimate may be wrong; else EngineError says what is missing.
    """
    way = Way("resident", "card", quantization=quantization if quantization in QUANTIZED else "none")
    machine = machine if model.context_parallel else replace(machine, cards=1)
    case = _Case(parts or Parts.of(model), Shape.of(model), work, machine, way)
    if not machine.free_vram_bytes:
        return case.in_ram()
    plans = [replace(case, way=way).plan() for way in _ways(profile, quantization, vae_config)]
    fitting = [candidate for candidate in plans if candidate.fits]
    if fitting:
        return min(fitting, key=lambda candidate: (candidate.job_s, candidate.peak_vram_bytes))
    least = min(plans, key=lambda candidate: (candidate.peak_vram_bytes, candidate.ram_bytes))
    too_large = max(least.peak_vram_bytes / machine.free_vram_bytes, least.ram_bytes / max(1, machine.free_ram_bytes))
    if profile or too_large <= DOUBT:
        return least
    raise EngineError(_refusal(model, work, machine, least), "out_of_memory")


def serves(current: Plan, model: Model, work: Work, parts: Parts | None = None) -> bool:
    """True if a model that lies as `current` says can run `work` too, without being placed anew."""
    case = _Case(parts or Parts.of(model), Shape.of(model), work, Machine(current.card_bytes, 0), current.way)
    room_bytes = max(current.card_bytes, current.peak_vram_bytes)
    return not current.card_bytes or case.peak_bytes(current.resident_bytes) <= room_bytes


@cache
def _ways(profile: float, quantization: str, vae_config: int) -> tuple[Way, ...]:
    sides = (TILES[vae_config],) if vae_config else TILE_SIDES
    kinds = ("none", "int8") if quantization == "auto" else (quantization,)
    choices = product(PROFILES[profile], sides, kinds)
    return tuple(replace(way, tile_side=side, quantization=kind) for way, side, kind in choices)


@dataclass(frozen=True)
class _Case:
    """One way for one job on one machine: the arithmetic."""

    parts: Parts
    shape: Shape
    work: Work
    machine: Machine
    way: Way

    def plan(self) -> Plan:
        resident = self._resident_bytes()
        streamed = self._denoisers() - resident if self.way.placement != "resident" else 0
        peak, ram = self.peak_bytes(resident), self._ram_bytes(streamed)
        step_s = self._step_s(streamed)
        fits = peak <= self.machine.free_vram_bytes and ram <= self.machine.free_ram_bytes
        job_s = self.job_s(step_s, streamed)
        free, cards = self.machine.free_vram_bytes, self.machine.cards
        return Plan(self.way, resident, streamed, peak, ram, step_s, job_s, free, fits, cards)

    def in_ram(self) -> Plan:
        """The plan for a machine without a card."""
        weights = self._denoisers() + self.parts.encoders + self.parts.vae
        ram = PROCESS_RAM_BYTES + weights + round(max(self.activation_bytes(), self.decode_bytes()))
        step_s = self.compute_s()
        job_s, cards = self.job_s(step_s, 0), self.machine.cards
        return Plan(self.way, self._denoisers(), 0, 0, ram, step_s, job_s, card_bytes=0, cards=cards)

    # ---- memory of the card

    def peak_bytes(self, resident_bytes: int) -> int:
        """The most memory of the card at once, over the three phases."""
        phases = _PHASES[self.way.placement](self, resident_bytes)
        return round(FRAGMENTATION * max(phases)) + RESERVE_BYTES

    def resident_phases(self, resident: int) -> tuple[float, ...]:
        """Bytes while encoding, denoising, decoding, with what stays there throughout."""
        stays = resident + self.parts.vae + (self.parts.encoders if self.way.encoders == "card" else 0)
        comes = 0 if self.way.encoders == "card" else self.parts.encoders * STREAMED_ENCODER
        blocks = self._blocks_bytes() if self.way.placement == "streamed" else 0
        return (
            stays + comes + ENCODER_BYTES,
            stays + blocks + self.activation_bytes(),
            stays + blocks / BLOCKS_AHEAD + self.decode_bytes(),
        )

    def swapped_phases(self, _resident: int) -> tuple[float, ...]:
        """Bytes while encoding, denoising, decoding, with one part on the card at a time."""
        return (
            self.parts.encoders + ENCODER_BYTES,
            self._denoisers() / self.parts.denoiser_count + self.activation_bytes(),
            self.parts.vae + self.decode_bytes(),
        )

    def sequential_phases(self, _resident: int) -> tuple[float, ...]:
        """Bytes while encoding, denoising, decoding, with one layer on the card at a time."""
        layer = self._denoisers() / self.parts.denoiser_count * LAYER_SHARE
        return (
            self.parts.encoders * STREAMED_ENCODER + ENCODER_BYTES,
            layer + self.activation_bytes(),
            self.parts.vae * STREAMED_ENCODER + self.decode_bytes(),
        )

    def _resident_bytes(self) -> int:
        """How much of the denoisers stays on the card."""
        if self.way.placement == "resident":
            return self._denoisers()
        if not self.way.fill:
            return 0
        room = (self.machine.free_vram_bytes - RESERVE_BYTES) / FRAGMENTATION - max(self.resident_phases(0))
        return max(0, min(int(room), self._denoisers()))

    def _denoisers(self) -> int:
        return round(self.parts.denoisers * QUANTIZED[self.way.quantization] / QUANTIZED[self.parts.quantization])

    def _blocks_bytes(self) -> float:
        """Of the blocks that are on the card only for a moment; of layers, if they come from mapped files."""
        one = self._denoisers() / self.parts.denoiser_count
        if not self.way.pinned:
            return one * LAYER_SHARE
        return BLOCKS_AHEAD * one / max(FEWEST_BLOCKS, power(self.parts.parameters, 1 / 3) / 60)

    def activation_bytes(self) -> float:
        """What a forward of the denoiser computes in."""
        tokens = self.work.tokens_at_once / self.machine.cards
        return ACTIVATION_BYTES * tokens * power(self.parts.parameters, 1 / 3)

    def decode_bytes(self) -> float:
        """What the VAE computes in, and the finished frames."""
        work, shape, side = self.work, self.shape, self.way.tile_side
        if not work.frames:
            return SOUND_DECODE_BYTES
        pixels = min(work.width, side or work.width) * min(work.height, side or work.height) * work.batch
        return (
            self.parts.vae_width * pixels * (shape.frame_bytes + shape.voxel_bytes * work.frames)
            + OUTPUT_BYTES * work.voxels
        )

    # ---- memory beside it

    def _ram_bytes(self, streamed_bytes: int) -> int:
        """RAM that the worker can't give back."""
        pinned = streamed_bytes * self.way.pinned + self.parts.encoders * self.way.encoders_pinned
        changed = 0 if self.way.pinned or not self.parts.changed else self.parts.denoisers
        return PROCESS_RAM_BYTES + max(round(PINNED_ROUNDING * pinned), changed)

    def _mapped_rate(self, streamed_bytes: int) -> float:
        """Bytes a second from the mapped files, or from the disk itself where RAM does not hold them."""
        in_ram = self.way.pinned or self.parts.changed
        mapped = streamed_bytes * (not in_ram) + self.parts.encoders * (not self.way.encoders_pinned)
        if self._ram_bytes(streamed_bytes) + mapped > self.machine.free_ram_bytes:
            return min(DISK_BYTES_PER_S, self.machine.link_bytes_per_s)
        most = PAGEABLE_BYTES_PER_S if self.way.placement == "swapped" else MAPPED_BYTES_PER_S
        return min(most, self.machine.link_bytes_per_s / 3)

    # ---- time

    def compute_s(self) -> float:
        """Seconds of arithmetic of a denoising step."""
        one = forward_flops(self.parts.parameters, self.work.tokens, self.shape.work) / (
            self.machine.flops_per_s * EFFICIENCY
        )
        slowdown = QUANTIZED_SLOWDOWN if self.way.quantization != "none" else 1.0
        shared = 1 / (self.machine.cards * TEAM_EFFICIENCY) if self.machine.cards > 1 else 1.0
        return one * self.work.passes * self.work.batch * slowdown * shared

    def _step_s(self, streamed_bytes: int) -> float:
        """Seconds of a denoising step. Copies from pinned memory hide behind the arithmetic, others add to it."""
        compute_s = self.compute_s()
        if self.way.placement in ("resident", "swapped"):
            return compute_s
        forwards = 1 if self.work.joined else self.work.passes
        moved = forwards * streamed_bytes / self.parts.denoiser_count
        if self.way.pinned:
            first, share = STREAM_OVERHEAD
            overhead = 1 + first + share * streamed_bytes / max(1, self._denoisers())
            return max(compute_s, moved / self.machine.link_bytes_per_s) * overhead
        return compute_s * (1 + sum(STREAM_OVERHEAD)) + moved / self._mapped_rate(streamed_bytes)

    def job_s(self, step_s: float, streamed_bytes: int) -> float:
        """Seconds of the whole job once the model is loaded."""
        work = self.work
        swaps_s = 2 * self._denoisers() / self._mapped_rate(streamed_bytes) if self.way.placement == "swapped" else 0
        denoise_s = work.steps * work.sections * step_s
        save_s = work.voxels / SAVED_VOXELS_PER_S
        return work.runs * (self._encode_s(streamed_bytes) + swaps_s + denoise_s + self._decode_s() + save_s)

    def _encode_s(self, streamed_bytes: int) -> float:
        compute_s = self.work.passes * self.parts.encoders * PROMPT_TOKENS / self.machine.flops_per_s
        rate = self.machine.link_bytes_per_s if self.way.encoders_pinned else self._mapped_rate(streamed_bytes)
        runs = self.work.passes * self.shape.encoder_runs
        trips = {"card": 0, "streamed": runs, "swapped": 2}
        return compute_s + trips[self.way.encoders] * self.parts.encoders / rate

    def _decode_s(self) -> float:
        work, side = self.work, self.way.tile_side
        slower = self.parts.vae_width > 1 and self.machine.free_vram_bytes  # a CPU was measured in float32
        rate = self.machine.flops_per_s * EFFICIENCY * (FLOAT32_SHARE if slower else 1)
        tiled = TILED_DECODE[side] if max(work.width, work.height) > side else 1.0
        layered = SEQUENTIAL_VAE if self.way.placement == "sequential" else 1.0
        size = min(1.0, self.parts.vae / (self.parts.vae_width * USUAL_VAE_BYTES))
        return size * DECODE_FLOPS * work.voxels / rate * tiled * layered


_PHASES: Mapping[str, Callable[[_Case, int], tuple[float, ...]]] = {
    "resident": _Case.resident_phases,
    "streamed": _Case.resident_phases,
    "swapped": _Case.swapped_phases,
    "sequential": _Case.sequential_phases,
}


def _refusal(model: Model, work: Work, machine: Machine, least: Plan) -> str:
    if least.ram_bytes > machine.free_ram_bytes:
        return (
            f"model: '{model.id}' needs about {_gib(least.ram_bytes)} of RAM, and {_gib(machine.free_ram_bytes)} are"
            " free. End other programs, or choose a smaller model."
        )
    return (
        f"model: '{model.id}' needs about {_gib(least.peak_vram_bytes)} of GPU memory for {work.told}, even with its"
        f" weights streamed in layer by layer, and {_gib(machine.free_vram_bytes)} are free. Ask for a smaller"
        " resolution, fewer frames or batch_size 1, or choose a smaller model."
    )


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
