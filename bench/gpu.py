"""What one denoising step, the VAE and the memory cost on a CUDA card, with random weights of the published shapes.

    python bench/gpu.py                    # all rows that fit the card
    python bench/gpu.py wan_t2v_14B        # one shape
    python bench/gpu.py --families         # which families have code that only a GPU runs
    python bench/gpu.py --device cpu --tiny  # does the script still work? Its figures mean nothing

No weights are downloaded: a step's time does not depend on their values. FLOPs by hand: a layer of width d, FFN f, N
tokens and T words takes 12Nd² + 4Ndf + 4N²d + 4NTd + 4Td².
"""

import argparse
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its engine.py is not the package

import torch  # noqa: E402
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel  # noqa: E402

from engine.capabilities import quantization_fault  # noqa: E402
from engine.catalog.models import Catalog  # noqa: E402
from engine.gpu.load import kernels, offloading, quantization  # noqa: E402
from engine.gpu.process import LOCAL_ONLY, Rank  # noqa: E402
from engine.gpu.team.sharing import Group, splits  # noqa: E402
from engine.planning.placement import Placement, Plan  # noqa: E402

WORDS = 512
PEAK_TFLOPS: Mapping[str, float] = {"H100": 989, "H200": 989, "A100": 312, "4090": 165, "L40": 181, "5090": 210}
RUNS = 3


@dataclass(frozen=True)
class Shape:
    """A denoiser and the video it makes; `anchor` is what others publish for it."""

    layers: int
    heads: int
    ffn: int
    channels: int
    width: int
    height: int
    frames: int
    vae_spatial: int
    anchor: str
    vae: Mapping[str, Any] = field(default_factory=dict)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        return (self.frames - 1) // 4 + 1, self.height // self.vae_spatial, self.width // self.vae_spatial

    @property
    def tokens(self) -> int:
        frames, height, width = self.latents
        return frames * height * width // 4

    @property
    def tflop(self) -> float:
        """Of one forward pass."""
        d, n, f = self.heads * 128, self.tokens, self.ffn
        return (
            self.layers * (12 * n * d**2 + 4 * n * d * f + 4 * n**2 * d + 4 * n * WORDS * d + 4 * WORDS * d**2) / 1e12
        )


WAN22_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "patch_size": 2,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
SHAPES = {
    "wan_t2v_1.3B": Shape(30, 12, 8960, 16, 832, 480, 81, 8, "4090: 5.2 s a step; H200: 1.16"),
    "wan_t2v_14B": Shape(40, 40, 13824, 16, 832, 480, 81, 8, "H100: diffusers 9.77 s a step, LightX2V 5.18"),
    "wan22_ti2v_5B": Shape(30, 24, 14336, 48, 1280, 704, 121, 16, "4090: 10.7 s a step; H200: 1.8", WAN22_VAE),
}
TINY = {"tiny": Shape(2, 2, 64, 16, 32, 32, 5, 8, "none", {"base_dim": 8})}


def transformer(shape: Shape, device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    """A denoiser of this shape with random weights, made on the device itself."""
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=shape.heads,
            num_layers=shape.layers,
            ffn_dim=shape.ffn,
            in_channels=shape.channels,
            out_channels=shape.channels,
        )
    model = model.to(dtype).to_empty(device=device).eval()
    model.rope = type(model.rope)(128, (1, 2, 2), 1024).to(device)  # its tables are computed, not weights
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """Fills in the seconds and the most memory of the block, in GiB."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    since = time.perf_counter()
    yield found
    if device.type == "cuda":
        torch.cuda.synchronize()
        found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    found["s"] = time.perf_counter() - since


def timed(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """The best of some runs, after one that does not count."""
    work()
    runs = []
    for _ in range(RUNS):
        with measured(device) as found:
            work()
        runs.append(found)
    return min(runs, key=lambda run: run["s"])


@torch.no_grad()
def step(
    model: Any, shape: Shape, device: torch.device, dtype: torch.dtype, before: Callable[[], Any] | None = None
) -> dict[str, float]:
    """One denoising step with guidance: two forward passes, and what is to be done before them."""
    latents = torch.randn(1, shape.channels, *shape.latents, device=device, dtype=dtype)
    text = torch.randn(1, WORDS, 4096, device=device, dtype=dtype)
    when = torch.tensor([500], device=device)

    def work() -> None:
        if before:
            before()
        for _ in range(2):
            model(latents, when, text, return_dict=False)

    return timed(work, device)


@torch.no_grad()
def decode(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The VAE's way from latents to frames."""
    vae = AutoencoderKLWan(**shape.vae).to(device, dtype).eval()
    latents = torch.randn(1, shape.channels, *shape.latents, device=device, dtype=dtype)
    return timed(lambda: vae.decode(latents, return_dict=False), device)


BACKENDS = ("native", "_native_flash", "_native_cudnn", "flash", "_flash_3", "sage", "xformers")
KINDS = ("int8", "fp8", "nf4")
# Pinned memory last: torch keeps what it has pinned. A step of a swapped model begins with its way to the card.
PLACEMENTS = {
    "resident": Placement("resident", "card"),
    "swapped": Placement("swapped", "swapped"),
    "by layer": Placement("sequential", "streamed"),
    "streamed, not pinned": Placement("streamed", "streamed"),
    "streamed, pinned": Placement("streamed", "streamed", pinned=True),
}

Row = tuple[str, Callable[[], dict[str, float]]]


def step_by_backend(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """A step with each attention kernel, and one that is compiled."""
    model = transformer(shape, device, dtype)

    def run(backend: str) -> dict[str, float]:
        kernels.set_backend(model, backend)
        return step(model, shape, device, dtype)

    def compiled() -> dict[str, float]:
        kernels.set_backend(model, kernels.NATIVE)
        model.compile_repeated_blocks(fullgraph=True)
        return step(model, shape, device, dtype)

    for backend in BACKENDS:
        yield f"step, attention {backend}", partial(run, backend)
    if device.type == "cuda":
        yield "step, blocks compiled", compiled


def step_by_kind(kind: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """A step with quantised weights."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if sentence := quantization_fault(kind, device.type, capability):
        raise RuntimeError(sentence)
    model = transformer(shape, device, dtype)
    with torch.no_grad():
        quantization.quantize(model, kind, device)
    return step(model.to(device), shape, device, dtype)


def step_by_placement(placement: Placement, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """A step of a denoiser that is placed as a memory plan may place it."""
    model = transformer(shape, device, dtype).to("cpu")
    pipe = WanPipeline(None, None, AutoencoderKLWan(**shape.vae), FlowMatchEulerDiscreteScheduler(), model)
    plan = Plan(placement, 0, offloading.size_bytes(model), 0, 0, step_s=0, job_s=0, card_bytes=0)
    offloading.carry_out(pipe, plan, device)
    swapped = placement.denoisers == "swapped"
    return step(model, shape, device, dtype, before=pipe.maybe_free_model_hooks if swapped else None)


def step_together(count: int, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """A step that several devices compute together, each in a process of its own; memory is that of the first."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(count) as team:
        seats = [Rank(rank, count, device.type, Path(folder) / "rendezvous") for rank in range(count)]
        return team.starmap(step_of_one, [(rank, shape, dtype) for rank in seats], chunksize=1)[0]


def step_of_one(rank: Rank, shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """The part of one device."""
    os.environ.update(LOCAL_ONLY)
    device = torch.device(rank.device, rank.rank if rank.device == "cuda" else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = transformer(shape, device, dtype)
    pipe, group = SimpleNamespace(components={"transformer": model}), Group(rank, device)
    if not splits(pipe, rank.count):
        raise ValueError(f"{shape.heads} heads can't be spread over {rank.count} devices")
    with group.shared(pipe):
        found = step(model, shape, device, dtype)
    group.leave()
    return found


def rows(shape: Shape, device: torch.device) -> Iterator[Row]:
    """Name of each way to run one shape, and what measures it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    yield from step_by_backend(shape, device, dtype)
    for kind in KINDS:
        yield f"step, {kind} weights", partial(step_by_kind, kind, shape, device, dtype)
    for name, placement in PLACEMENTS.items():
        yield f"step, {name}", partial(step_by_placement, placement, shape, device, dtype)
    cards = torch.cuda.device_count() if device.type == "cuda" else 2
    for count in (count for count in (2, 4, 8) if count <= cards):
        yield f"step, {count} devices together", partial(step_together, count, shape, device, dtype)
    for name, precision in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        yield f"VAE decode, {name}", partial(decode, shape, device, precision)


def tried(work: Callable[[], dict[str, float]]) -> tuple[str, dict[str, float]]:
    """What went wrong, if anything, and the figures. Most often it is not installed or does not fit the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return "", work()
    except (RuntimeError, ValueError, ImportError, NotImplementedError, AssertionError) as error:
        return f": {(str(error) or type(error).__name__).splitlines()[0][:90]}", {}


def peak_tflops(device: torch.device) -> float | None:
    """The card's dense bf16 peak, if it is known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def print_table(title: str, shape: Shape, device: torch.device) -> None:
    """The rows of one shape as Markdown."""
    peak = peak_tflops(device)
    print(f"\n### {title}: {shape.width}x{shape.height}, {shape.frames} frames, {shape.tokens} tokens, ", end="")
    print(f"{2 * shape.tflop:.0f} TFLOP a step. Published: {shape.anchor}\n")
    print("| what | s | share of the peak | GiB |\n|---|---|---|---|")
    for name, work in rows(shape, device):
        failure, found = tried(work)
        what = name + failure
        share = 2 * shape.tflop / found["s"] / peak if found and peak and what.startswith("step") else None
        cells = [what, *(f"{found[key]:.3f}" if key in found else "-" for key in ("s",))]
        cells += [f"{share:.0%}" if share else "-", f"{found['GiB']:.1f}" if "GiB" in found else "-"]
        print("| " + " | ".join(cells) + " |", flush=True)


def print_families() -> None:
    """What runs on a GPU only, by family: dtypes of its own, and offload by the memory plan."""
    print("| family | dtypes on a GPU | largest model in bf16 |\n|---|---|---|")
    families: dict[str, list[Any]] = {}
    for model in Catalog.load():
        families.setdefault(model.family, []).append(model)
    for family, models in sorted(families.items()):
        dtypes = sorted({f"{part} {dtype}" for model in models for part, dtype in model.dtypes.items()})
        print(f"| {family} | {', '.join(dtypes)} | {max(model.total_bf16_bytes for model in models) / 1e9:.0f} GB |")


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", choices=[[], *SHAPES], help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one shape that any machine runs in seconds")
    parser.add_argument("--families", action="store_true")
    options = parser.parse_args()
    if options.families:
        return print_families()
    device = torch.device(options.device)
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", torch.__version__)
    chosen = TINY if options.tiny else {name: SHAPES[name] for name in options.shapes or SHAPES}
    for name, shape in chosen.items():
        print_table(name, shape, device)
    return None


if __name__ == "__main__":
    main()
