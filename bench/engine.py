"""What the daemon costs above bare diffusers, and what each option of the engine gains and changes. On a CPU.

Both sides of a row run in turns (off, on, off, on …), so that what else the machine does falls on both. Times are of
one task, from its request to its finished file. The likeness compares the frames of both sides: of the same seed
and settings, in lossless files.
Usage: python bench/engine.py [--rounds N] [--quick]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # the tests' daemon is not installed

import av  # noqa: E402
import numpy as np  # noqa: E402

from tests.daemon import Daemon  # noqa: E402

BARE = ROOT / "bench" / "bare.py"
DEMO = ROOT / "engine" / "demo"
LAYERED = "bench_14B"
# The layers of Wan 14B at the least width that the embedded model's other parts can be put around.
LAYERED_SHAPE = {"num_layers": 40, "num_attention_heads": 2, "ffn_dim": 128}
JOB: Mapping[str, Any] = {
    "prompt": "a red circle moving right",
    "negative_prompt": "blurred",
    "resolution": "64x64",
    "video_length": 17,
    "num_inference_steps": 12,
    "guidance_scale": 2.5,
    "flow_shift": 5.0,
    "seed": 1,
}
LOSSLESS = {"video_crf": 0}
FINE = 4  # times the rounds of other rows, for a difference that is smaller than what one run differs from the next
PATIENCE_S = 3600.0  # a first compile on a busy machine takes minutes

Run = Callable[[], Path]


@dataclass(frozen=True)
class Row:
    """One comparison: the seconds of each task of both sides, and how alike their frames are."""

    name: str
    off_s: list[float]
    on_s: list[float]
    likeness_db: float | None

    def markdown(self) -> str:
        off, on = statistics.median(self.off_s), statistics.median(self.on_s)
        likeness = (
            "-" if self.likeness_db is None else "same" if self.likeness_db == np.inf else f"{self.likeness_db:.0f}"
        )
        # Of the runs side by side: the machine was alike for both of a pair, and not from the first pair to the last.
        more_ms = 1000 * statistics.median(late - early for early, late in zip(self.off_s, self.on_s, strict=True))
        spans = [f"{min(times):.2f} to {max(times):.2f}" for times in (self.off_s, self.on_s)]
        cells = [f"{off:.2f} ({spans[0]})", f"{on:.2f} ({spans[1]})", f"{more_ms:+.0f}", f"{off / on:.2f}"]
        return f"| {' | '.join([self.name, *cells, likeness])} |"


HEADER = """| what | s, off | s, on | ms more | times as fast | likeness, dB |
|---|---|---|---|---|---|"""


def compared(name: str, off: Run, on: Run, rounds: int) -> Row:
    """Both in turns, after a run of each that does not count."""
    files = [off(), on()]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, found in zip((off, on), times, strict=True):
            since = time.perf_counter()
            run()
            found.append(time.perf_counter() - since)
    return Row(name, *times, likeness(*files))


def likeness(one: Path, other: Path) -> float | None:
    """PSNR of two videos in dB, infinite for the same frames; None if they are of different lengths."""
    first, second = (frames(path) for path in (one, other))
    if first.shape != second.shape:
        return None
    error = float(np.mean((first - second) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else np.inf


def frames(path: Path) -> Any:
    """(F, H, W, 3) float, RGB."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


# ---- the sides


@contextmanager
def daemon(folder: Path, models_dir: Path, **config: Any) -> Iterator[Daemon]:
    """A daemon with this configuration; its worker starts with the first task."""
    with Daemon(folder, **{"models_dir": str(models_dir), **LOSSLESS, **config}) as running:
        yield running


def task(running: Daemon, model: str, **fields: Any) -> Run:
    """What sends this task and waits for its file."""

    def run() -> Path:
        body = {**JOB, "model_type": model, **fields}
        path = f"/status/{running.post('/generate', body).json()['data']['task_id']}?wait=60"
        deadline = time.monotonic() + PATIENCE_S
        while (state := running.get(path, timeout=90).json()["data"])["finished_at"] is None:
            assert time.monotonic() < deadline, state
        return running.made(state)

    return run


class Bare:
    """Diffusers in a process of its own, without wangpd: its pipeline stays loaded, as the daemon's does."""

    def __init__(self, weights: Path, file: Path, steps: int) -> None:
        self._file = file
        job = json.dumps({**JOB, "num_inference_steps": steps})
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(BARE), "serve", str(weights), str(file), job],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # at the end of its input it ends

    def __call__(self) -> Path:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"
        return self._file


# ---- the rows

REQUESTS: Mapping[str, Mapping[str, Any]] = {
    "step cache mag, 2x": {"skip_steps_cache_type": "mag", "skip_steps_multiplier": 2.0},
    "step cache tea, 2x": {"skip_steps_cache_type": "tea", "skip_steps_multiplier": 2.0},
    "step cache fbc, 2x": {"skip_steps_cache_type": "fbc", "skip_steps_multiplier": 2.0},
    "step cache taylorseer, 2x": {"skip_steps_cache_type": "taylorseer", "skip_steps_multiplier": 2.0},
    "sliding windows of 9 frames": {"sliding_window_size": 9, "sliding_window_overlap": 1},
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "prompt cache": {"prompt_cache_mb": 256},
    "attention sdpa instead of auto": {"attention_mode": "sdpa"},
    "int8 weights": {"transformer_quantization": "int8"},
    "compiled blocks": {"compile": True},
    "two processes together": {"devices": ["cpu", "cpu"], "context_parallel": True},
}


def rows(model: str, weights: Path, models_dir: Path, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Every comparison of one model."""
    few = {"num_inference_steps": options.steps}
    # Nothing may be left out that bare diffusers does.
    with daemon(folder / "plain", models_dir, prompt_cache_mb=0) as running:
        plain = task(running, model, **few)
        yield first_and_second(plain)
        with Bare(weights, folder / "bare.mp4", options.steps) as bare:
            yield compared("wangpd over HTTP instead of bare diffusers", bare, plain, FINE * options.rounds)
        for name, fields in options.requests.items():
            yield compared(name, plain, task(running, model, **few, **fields), options.rounds)
        for name, config in options.settings.items():
            with daemon(folder / name.replace(" ", "_"), models_dir, **{"prompt_cache_mb": 0, **config}) as other:
                yield compared(name, plain, task(other, model, **few), options.rounds)


def first_and_second(run: Run) -> Row:
    """The first task starts the worker and loads the model; the second finds both."""
    times = []
    for _ in range(2):
        since = time.perf_counter()
        run()
        times.append(time.perf_counter() - since)
    return Row("second task instead of the first", times[:1], times[1:], None)


def make_layered(models_dir: Path) -> Path:
    """A model with the layers of Wan 14B and random weights, as a user's own; returns its folder."""
    folder = models_dir / LAYERED
    shutil.copytree(DEMO, folder)
    shutil.rmtree(folder / "transformer")
    shape = {**json.loads((DEMO / "transformer" / "config.json").read_text()), **LAYERED_SHAPE}
    command = [sys.executable, "-W", "ignore", str(BARE), "make", str(folder / "transformer"), json.dumps(shape)]
    subprocess.run(command, check=True, capture_output=True)
    entry = f'[[models]]\nid = "{LAYERED}"\nbase = "wan_demo"\nbuiltin = ""\nname = "Wan 14B, narrow"\n'
    (models_dir / "bench.toml").write_text(entry)
    return folder


def machine() -> str:
    """What it ran on, in a line."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in about.splitlines() if line.startswith("model name")]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = f"Python {sys.version.split()[0]}, torch {version('torch')}, diffusers {version('diffusers')}"
    return f"{os.cpu_count()} cores of {names[0] if names else 'a CPU'}, one thread, load average {load}; {versions}"


def _chosen(rows: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    return {name: fields for name, fields in rows.items() if part in name}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only the rows of options whose name holds this")
    parser.add_argument("--quick", action="store_true", help="some rows of the embedded model, in seconds")
    options = parser.parse_args()
    options.steps = 2 if options.quick else JOB["num_inference_steps"]
    options.requests = dict(list(REQUESTS.items())[:1]) if options.quick else _chosen(REQUESTS, options.only)
    options.settings = {} if options.quick else _chosen(SETTINGS, options.only)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="wangpd-bench-") as place:
        models_dir = Path(place) / "models"
        models_dir.mkdir()
        models = {"wan_demo": DEMO}
        if not options.quick:
            models[LAYERED] = make_layered(models_dir)
        for model, weights in models.items():
            if model == LAYERED:  # its weights are random: there is nothing that a cache could foresee
                options.requests = {}
            print(f"\n### {model}\n\n{HEADER}", flush=True)
            for row in rows(model, weights, models_dir, Path(place) / model, options):
                print(row.markdown(), flush=True)


if __name__ == "__main__":
    main()
