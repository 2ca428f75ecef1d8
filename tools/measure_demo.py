"""Measure the embedded model: `python -m tools.measure_demo engine/demo`.

The judge is tried on drawn clips first: a metric that misreads the truth can't judge a model. Then come clips of
combinations that training never saw, with fresh seeds. Prints a table, and ends with 1 when a figure misses its floor.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from tools.demo.captions import caption, plain_caption
from tools.demo.judge import Reading, read_clip
from tools.demo.sampling import Frames, Request, Sampler, Settings
from tools.demo.scene import SIZES, Scene, Traits, combinations, place
from tools.demo.shapes import as_uint8, render
from tools.demo.sheet import write_sheet

SEED = 20_000  # far from anything that training used
WIDE = Settings(frames=33, height=64, width=96)
DEFAULTS = Settings()
LONG = Settings(frames=33)
WINDOWS = 3  # of a long video; each goes on from the last frame of the one before
SHEET_ROWS = 24


class Figure(NamedTuple):
    """One number of the table; higher is better unless it is a ceiling."""

    name: str
    value: float
    floor: float | None = None
    ceiling: float | None = None

    @property
    def met(self) -> bool:
        """Whether the number is good enough, where good enough was defined."""
        return (self.floor is None or self.value >= self.floor) and (self.ceiling is None or self.value <= self.ceiling)


class Case(NamedTuple):
    """A request and what its clip should show."""

    traits: Traits
    request: Request


class Bench:
    """The model, how many clips each part may use, and where the contact sheets go."""

    def __init__(self, folder: Path, clips: int, sheets: Path | None) -> None:
        self.sampler, self.clips, self.sheets = Sampler(folder), clips, sheets

    def read(self, title: str, cases: Sequence[Case], settings: Settings = DEFAULTS) -> list[tuple[Reading, Frames]]:
        """Make and judge the clips of some cases, and keep the first ones for the eye."""
        clips = list(self.sampler.clips((case.request for case in cases), settings))
        if self.sheets:
            prompts = [case.request.prompt or "(no prompt)" for case in cases[:SHEET_ROWS]]
            write_sheet(self.sheets / f"{title}.png", prompts, clips[:SHEET_ROWS])
        return [(read_clip(clip), clip) for clip in clips]


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / max(1, len(hits))


def _accuracies(
    title: str, cases: Sequence[Case], readings: Sequence[Reading], floors: dict[str, float]
) -> Iterator[Figure]:
    """The share of clips that show what was asked, trait by trait."""
    names = {"color": "color", "shape": "shape", "direction": "motion", "background": "background"}
    for seen, asked in names.items():
        hits = [
            getattr(reading, seen) == getattr(case.traits, asked) for case, reading in zip(cases, readings, strict=True)
        ]
        yield Figure(f"{title}: {seen}", _share(hits), floors.get(seen))


def _cleanness(title: str, readings: Sequence[Reading]) -> Iterator[Figure]:
    yield Figure(f"{title}: fit of the shape", float(np.mean([reading.fit for reading in readings])))
    yield Figure(f"{title}: clips with a second object", _share([reading.stray > 0.05 for reading in readings]))
    yield Figure(f"{title}: jitter in pixels", float(np.mean([reading.jitter for reading in readings])))


def _held_out(count: int, rng: random.Random) -> list[Traits]:
    """Held-out combinations in turn, shuffled."""
    every = combinations(held=True)
    rng.shuffle(every)
    return (every * (count // len(every) + 1))[:count]


def _plain_cases(count: int, seed: int) -> list[Case]:
    traits = _held_out(count, random.Random(seed))
    return [Case(each, Request(plain_caption(each), seed + i)) for i, each in enumerate(traits)]


def _drawn(count: int, settings: Settings, *, seed: int) -> tuple[list[Scene], torch.Tensor]:
    """Scenes of held-out combinations, drawn: (N, 3, F, H, W) in [-1, 1]"""
    rng = random.Random(seed)
    scenes = [place(traits, rng) for traits in _held_out(count, rng)]
    return scenes, render(scenes, settings.frames, settings.height, settings.width)


def metric_on_truth(bench: Bench) -> Iterator[Figure]:
    """The judge against clips that are right by construction."""
    scenes, video = _drawn(bench.clips, DEFAULTS, seed=SEED)
    cases = [Case(scene.traits, Request("", 0)) for scene in scenes]
    readings = [read_clip(clip) for clip in as_uint8(video).numpy()]
    floors = dict.fromkeys(("color", "shape", "direction", "background"), 0.99)
    yield from _accuracies("judge on drawn clips", cases, readings, floors)


def text_to_video(bench: Bench) -> Iterator[Figure]:
    """Held-out combinations with the shipped defaults."""
    cases = _plain_cases(bench.clips, SEED + 1000)
    readings = [reading for reading, _ in bench.read("text", cases)]
    floors = {"color": 0.95, "direction": 0.95, "background": 0.95, "shape": 0.85}
    yield from _accuracies("text to video", cases, readings, floors)
    yield from _cleanness("text to video", readings)


def free_wording(bench: Bench) -> Iterator[Figure]:
    """The same combinations in any word order, with synonyms, fillers and unknown words."""
    rng = random.Random(SEED + 2)
    traits = _held_out(bench.clips // 2, rng)
    worded = [(each, caption(each, rng, drop=0)) for each in traits]
    cases = [Case(each, Request(f"{words} zebra", SEED + 2000 + i)) for i, (each, words) in enumerate(worded)]
    readings = [reading for reading, _ in bench.read("wording", cases)]
    yield from _accuracies("free wording", cases, readings, {})


def sizes(bench: Bench) -> Iterator[Figure]:
    """Small and large, told apart by the measured diameter."""
    rng = random.Random(SEED + 3)
    traits = [each._replace(size=rng.choice(list(SIZES))) for each in _held_out(bench.clips // 4, rng)]
    cases = [Case(each, Request(plain_caption(each), SEED + 3000 + i)) for i, each in enumerate(traits)]
    readings = [reading for reading, _ in bench.read("sizes", cases)]
    middle = (SIZES["small"][1] + SIZES["large"][0]) / 2
    hits = [(r.diameter > middle) == (case.traits.size == "large") for case, r in zip(cases, readings, strict=True)]
    yield Figure("size: small or large", _share(hits))


def wide_and_long(bench: Bench) -> Iterator[Figure]:
    """96 x 64 pixels and 33 frames."""
    cases = _plain_cases(bench.clips // 3, SEED + 4000)
    readings = [reading for reading, _ in bench.read("wide", cases, WIDE)]
    yield from _accuracies("96x64, 33 frames", cases, readings, {"color": 0.90, "direction": 0.90})
    yield from _cleanness("96x64, 33 frames", readings)


@torch.no_grad()
def vae_round_trip(bench: Bench) -> Iterator[Figure]:
    """Drawn clips through the encoder and the decoder."""
    vae = bench.sampler.text.vae
    scenes, video = _drawn(bench.clips // 3, DEFAULTS, seed=SEED + 5)
    back = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in video.split(4)])
    errors = (back - video).square().flatten(1).mean(1)
    decibels = 10 * torch.log10(4 / errors)
    shapes = [read_clip(clip).shape for clip in as_uint8(back).numpy()]
    yield Figure("VAE round trip: PSNR in dB", float(decibels.mean()), 30)
    yield Figure("VAE round trip: worst PSNR in dB", float(decibels.min()))
    hits = [shape == scene.traits.shape for shape, scene in zip(shapes, scenes, strict=True)]
    yield Figure("VAE round trip: shape", _share(hits), 0.95)


def image_to_video(bench: Bench) -> Iterator[Figure]:
    """Drawn first frames; every other prompt names the direction and nothing else."""
    scenes, video = _drawn(bench.clips // 3, DEFAULTS, seed=SEED + 6)
    stills = as_uint8(video)[:, 0].numpy()
    prompts = [plain_caption(s.traits) if i % 2 else _motion_only(s.traits) for i, s in enumerate(scenes)]
    pictures = [Image.fromarray(still) for still in stills]
    cases = [
        Case(scene.traits, Request(prompt, SEED + 6000 + i, image=picture))
        for i, (scene, prompt, picture) in enumerate(zip(scenes, prompts, pictures, strict=True))
    ]
    results = bench.read("image", cases)
    readings = [reading for reading, _ in results]
    yield from _accuracies("image to video", cases, readings, {})
    errors = [np.square(clip[0] - still.astype(float)).mean() for still, (_, clip) in zip(stills, results, strict=True)]
    yield Figure("image to video: first frame PSNR in dB", float(np.mean(10 * np.log10(255**2 / np.array(errors)))))


def _motion_only(traits: Traits) -> str:
    return "the object standing still" if traits.motion == "still" else f"the object moving {traits.motion}"


def _slow_cases(count: int, seed: int) -> list[Case]:
    """Held-out combinations that move, slowly."""
    moving = [each._replace(slow=True) for each in _held_out(2 * count, random.Random(seed)) if each.motion != "still"]
    return [Case(each, Request(plain_caption(each), seed + i)) for i, each in enumerate(moving[:count])]


def _going_on(case: Case, clip: Frames) -> Case:
    """The request for the next window."""
    return case._replace(request=case.request._replace(image=Image.fromarray(clip[-1]), seed=case.request.seed + 100))


def slow_motion(bench: Bench) -> Iterator[Figure]:
    """Clips of the default length that are asked to be slow still move, and as asked."""
    cases = _slow_cases(bench.clips // 3, SEED + 10_000)
    readings = [reading for reading, _ in bench.read("slow", cases)]
    yield from _accuracies("slowly", cases, readings, {"direction": 0.90})


def long_videos(bench: Bench) -> Iterator[Figure]:
    """Slow prompts over several windows: each window has to move as asked, and the next to begin where it ended."""
    cases = _slow_cases(bench.clips // 8, SEED + 11_000)
    windows: list[list[tuple[Reading, Frames]]] = []
    for number in range(WINDOWS):
        windows.append(bench.read(f"long-{number + 1}", cases, LONG))
        cases = [_going_on(case, clip) for case, (_, clip) in zip(cases, windows[-1], strict=True)]
    hits = [
        [seen.direction == case.traits.motion for case, (seen, _) in zip(cases, window, strict=True)]
        for window in windows
    ]
    yield Figure("three windows: windows that move as asked", _share([hit for window in hits for hit in window]))
    yield Figure("three windows: videos that always do", _share([all(video) for video in zip(*hits, strict=True)]), 0.9)
    yield from _accuracies("three windows, the last", cases, [seen for seen, _ in windows[-1]], {})
    seams = [_seam([clip for _, clip in video]) for video in zip(*windows, strict=True)]
    yield Figure("three windows: worst seam over normal change", float(np.median(seams)))


def _seam(windows: list[Frames]) -> float:
    """The largest change at a seam, over the median change between frames; the next window's own first frame, which
    shows the same moment, is left out."""
    video = np.concatenate([windows[0], *(window[1:] for window in windows[1:])]).astype(float)
    changes = np.abs(np.diff(video, axis=0)).mean((1, 2, 3))
    seams = np.cumsum([len(window) - 1 for window in windows])[:-1]
    return float(changes[seams].max() / np.median(changes))


def _open_colors(bench: Bench, title: str, negative: str) -> list[str]:
    """The colours that a prompt without a colour turns out in."""
    prompt, traits = "a circle moving right on a black background", Traits("", "circle", "right", "black")
    cases = [Case(traits, Request(prompt, SEED + 7000 + i, negative)) for i in range(bench.clips // 4)]
    return [reading.color for reading, _ in bench.read(title, cases)]


def negative_prompt(bench: Bench) -> Iterator[Figure]:
    """How often an open prompt takes its favourite colour, and how often when that one is unwanted."""
    colors = _open_colors(bench, "negative-without", "")
    favourite = Counter(colors).most_common(1)[0][0]
    avoiding = _open_colors(bench, "negative-with", favourite)
    yield Figure("an open prompt takes its favourite colour", _share([c == favourite for c in colors]))
    yield Figure("the same with that colour as negative prompt", _share([c == favourite for c in avoiding]))


def guidance(bench: Bench) -> Iterator[Figure]:
    """What guidance adds over none."""
    cases = _plain_cases(bench.clips // 4, SEED + 8000)
    for scale in (1.0, DEFAULTS.guidance, 5.0):
        readings = [reading for reading, _ in bench.read(f"guidance-{scale}", cases, Settings(guidance=scale))]
        yield from _accuracies(f"guidance {scale}", cases, readings, {})


def speed(bench: Bench) -> Iterator[Figure]:
    """Seconds a clip, one at a time, the process warm."""
    seconds = []
    for case in _plain_cases(6, SEED + 9000):
        begin = time.perf_counter()
        list(bench.sampler.clips([case.request]))
        seconds.append(time.perf_counter() - begin)
    yield Figure("seconds a clip", float(np.median(seconds[1:])), ceiling=3.0)


PARTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "metric": metric_on_truth,
    "speed": speed,
    "vae": vae_round_trip,
    "text": text_to_video,
    "image": image_to_video,
    "wide": wide_and_long,
    "slow": slow_motion,
    "long": long_videos,
    "wording": free_wording,
    "sizes": sizes,
    "negative": negative_prompt,
    "guidance": guidance,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the embedded model.")
    parser.add_argument("model", type=Path, help="diffusers folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clips", type=int, default=210, help="clips of the largest part; others use a share of it")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    return parser.parse_args(arguments)


def _line(figure: Figure) -> str:
    wanted = f">= {figure.floor:g}" if figure.floor is not None else ""
    wanted = f"<= {figure.ceiling:g}" if figure.ceiling is not None else wanted
    return f"{figure.name:52} {figure.value:8.3f}  {wanted:8}{'' if figure.met else 'MISSED'}"


def main() -> None:
    """Measure, print, and say by the exit status whether every floor is met."""
    options = parse()
    if options.sheets:
        options.sheets.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.model, options.clips, options.sheets)
    figures: list[Figure] = []
    for part in options.parts:
        for figure in PARTS[part](bench):
            figures.append(figure)
            print(_line(figure), flush=True)
        if part == "metric" and not all(figure.met for figure in figures):
            sys.exit("the judge misreads drawn clips: its verdict on the model would mean nothing")
    if options.json:
        table = {figure.name: round(figure.value, 4) for figure in figures}
        options.json.write_text(json.dumps(table, indent=2) + "\n")
    sys.exit(0 if all(figure.met for figure in figures) else 1)


if __name__ == "__main__":
    main()
