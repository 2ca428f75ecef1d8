"""The proof of a model: what is asked of it through HTTP, and what the answers and the files must show.

A case is one task of one model. It is run as it is, once more with the same seed, and then with each setting and each
input changed alone: whatever the catalogue says that a model takes has to reach the pixels or the samples.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.catalog.abilities import INPUTS, TASKS
from engine.catalog.models import Catalog, Model
from engine.gpu.save import encode
from tests.daemon import Daemon
from tests.frames import read_video

CATALOG = Catalog.load()
SEED = 1234
PLAIN: Mapping[str, Any] = {
    "prompt": "red circle moving right",
    "negative_prompt": "",
    "guidance_scale": 4.0,
    "guidance2_scale": 4.0,
    "embedded_guidance_scale": 4.0,
    "flow_shift": 5.0,
    "denoising_strength": 0.8,
    "duration_seconds": 1.0,
    "lyrics": "la la la",
}
OTHER: Mapping[str, Any] = {
    "prompt": "blue square going up",
    "negative_prompt": "green triangle",
    "guidance_scale": 9.0,
    "guidance2_scale": 9.0,
    "embedded_guidance_scale": 9.0,
    "flow_shift": 1.5,
    "denoising_strength": 0.4,
    "duration_seconds": 2.0,
    "lyrics": "doo bee doo",
}


NO_PROMPT = "prompt: model '{}' has no such setting, the value was ignored"


@dataclass(frozen=True)
class Proof:
    """How a model is asked, where its catalogue entry alone does not say it.

    `mute` names settings and inputs that can't show, with the reason in a comment beside it; `without` are inputs that
    can't come together with the others.
    """

    side: int = 0  # pixels; 0: two size steps
    frames: int = 0  # 0: the shortest length from 5 on
    steps: int = 4
    settings: Mapping[str, Any] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    mute: frozenset[str] = frozenset()
    seconds_in: float = 1.0  # length of the videos and sounds that are sent


@dataclass(frozen=True)
class Case:
    """One task of one model."""

    model_id: str
    task: str
    proof: Proof = Proof()

    def __str__(self) -> str:
        return f"{self.model_id}-{self.task}"

    @property
    def model(self) -> Model:
        return CATALOG.get(self.model_id)

    @property
    def side(self) -> int:
        return self.proof.side or 2 * self.model.spatial_multiple

    @property
    def frames(self) -> int:
        """What the file must have."""
        if self.model.kind == "video":
            return self.model.frames.nearest(self.proof.frames or 5)
        return 1 if self.model.kind == "image" else 0

    @property
    def inputs(self) -> list[str]:
        """The inputs that are sent: what the task needs, and what it may have."""
        taken, task = self.model.inputs_of(self.task), TASKS[self.task]
        needed = next(inputs for inputs in task.needs if inputs <= taken)
        return sorted((needed | task.may & taken) - self.proof.without)

    @property
    def settings(self) -> list[str]:
        """The settings that this model has."""
        names = [name for name in PLAIN if self.model.has_setting(name, self.task)]
        return names if "prompt" in names else ["prompt", *names]


def request_of(case: Case) -> dict[str, Any]:
    """The fields of the plain request, inputs left out."""
    fields = {name: PLAIN[name] for name in case.settings} | {"model_type": case.model_id, "seed": SEED}
    if case.model.has_setting("num_inference_steps", case.task):
        fields["num_inference_steps"] = case.proof.steps
    if case.model.kind != "audio":
        fields["resolution"] = f"{case.side}x{case.side}"
    if case.model.kind == "video":
        fields["video_length"] = case.frames
    return {**fields, "task": case.task, **case.proof.settings}


def changes(case: Case) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name of each further run, the fields that are other, and the input that is another ("" for none)."""
    for name in case.settings:
        if case.model.has_setting(name, case.task) and name not in case.proof.mute:
            yield name, {name: OTHER[name]}, ""
    yield "seed", {"seed": SEED + 1}, ""
    for name in case.inputs:
        if name not in case.proof.mute:
            yield f"another {name}", {}, name


# ----------------------------------------------------------------------------------------------------------- inputs


def blocks(side: int, seed: int) -> NDArray[np.uint8]:
    """A picture (side, side, 3) of plain blocks, 4 by 4, in colours of their own: coarse enough for any VAE."""
    colours = np.random.default_rng(seed).integers(20, 236, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST))


def halves(side: int, seed: int) -> NDArray[np.uint8]:
    """A mask: one half white; `seed` says which."""
    mask = np.zeros((side, side, 3), np.uint8)
    half = slice(side // 2, None) if seed % 2 else slice(0, side // 2)
    mask[:, half] = 255
    return mask


def picture(name: str, case: Case, seed: int) -> bytes:
    return png(drawn(name, case.side or 32, seed))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def drawn(name: str, side: int, seed: int) -> NDArray[np.uint8]:
    return halves(side, seed) if INPUTS[name].role == "mask" else blocks(side, seed)


def video(name: str, case: Case, seed: int, folder: Path) -> bytes:
    """As many frames as the case asks for, each another picture, at the model's rate."""
    path = folder / f"{name}-{seed}.mp4"
    steady = INPUTS[name].role == "mask"
    frames = np.stack([drawn(name, case.side, seed if steady else seed * 1000 + i) for i in range(case.frames)])
    encode.write_video(path, frames, case.model.fps, None, crf=1)
    return path.read_bytes()


def sound(case: Case, seed: int, folder: Path) -> bytes:
    """A tone of its own."""
    path = folder / f"tone-{seed}.wav"
    times = np.arange(int(case.proof.seconds_in * 16000)) / 16000
    wave = 0.5 * np.sin(2 * np.pi * (220 + 110 * seed) * times).astype(np.float32)
    encode.write_sound(path, encode.Sound(np.stack([wave, wave]), 16000), None)
    return path.read_bytes()


def file_of(name: str, case: Case, seed: int, folder: Path) -> bytes:
    kind = INPUTS[name].kind
    if kind == "image":
        return picture(name, case, seed)
    return video(name, case, seed, folder) if kind == "video" else sound(case, seed, folder)


# ------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One finished task and what its files hold, in levels of 255 or of 16 bits."""

    state: dict[str, Any]
    contents: tuple[NDArray[np.float64], ...]

    @property
    def content(self) -> NDArray[np.float64]:
        """Of the first file."""
        return self.contents[0]


def submit(daemon: Daemon, case: Case, change: Mapping[str, Any], other: str, folder: Path) -> int:
    """Queue one run as a form, the input `other` being another than in the plain run."""
    fields = {**request_of(case), **change}
    words = [(name, (None, str(value))) for name, value in fields.items()]
    files = [
        (name, ("file", file_of(name, case, place + (50 if name == other else 1), folder)))
        for place, name in enumerate(case.inputs)
    ]
    answer = daemon.request("POST", "/generate", files=[*words, *files])
    assert answer.status_code == 200, answer.text
    return int(answer.json()["data"]["task_id"])


def finished(daemon: Daemon, task_id: int) -> Run:
    state = daemon.finish(task_id, timeout=300)
    assert state["status"] == "completed", (state["error"], state["settings"])
    return Run(state, tuple(content(daemon.made(state, number)) for number in range(len(state["files"]))))


def content(path: Path) -> NDArray[np.float64]:
    """The pixels or the samples of a file."""
    if path.suffix == ".mp4":
        return read_video(path).astype(float)
    if path.suffix == ".png":
        return np.asarray(Image.open(path)).astype(float)
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1).astype(float)


def difference(one: Run, other: Run) -> float:
    """Mean distance of the first files."""
    return distance(one.content, other.content)


def distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Mean distance in levels; endless between files of different length."""
    return float(np.abs(one - other).mean()) if one.shape == other.shape else float("inf")


def has_sound(path: Path) -> bool:
    with av.open(str(path)) as container:
        return bool(container.streams.audio)


def faults(case: Case, runs: Mapping[str, Run], daemon: Daemon) -> Iterator[str]:
    """What does not hold of these runs, a sentence each."""
    yield from shape_faults(case, runs["plain"].state)
    if not np.array_equal(runs["plain"].content, runs["again"].content):
        yield f"the same seed gave other content, by {difference(runs['plain'], runs['again']):.2f} levels"
    for name, _, _ in changes(case):
        if (change := difference(runs["plain"], runs[name])) < 1.0:
            yield f"{name}: changed the content by {change:.3f} levels only"
    yield from batch_faults(runs)
    pipeline = case.model.pipelines[case.task]
    if case.model.kind == "video" and bool(pipeline.sample_rate) != has_sound(daemon.made(runs["plain"].state)):
        yield "the sound is missing, or was not to be there"


BATCH_TOLERANCE = 0.5  # levels: a batch adds up in another order, and the codec may then choose otherwise


def batch_faults(runs: Mapping[str, Run]) -> Iterator[str]:
    """The files of one call are to be those of single runs."""
    if "batch" not in runs:
        return
    for number, single in enumerate((runs["plain"], runs["seed"])):
        if (apart := distance(single.content, runs["batch"].contents[number])) > BATCH_TOLERANCE:
            yield f"file {number} of a batch is not that of a single run, by {apart:.2f} levels"


def shape_faults(case: Case, state: Mapping[str, Any]) -> Iterator[str]:
    file, model = state["files"][0], case.model
    side = 0 if model.kind == "audio" else case.side
    wanted = {
        "type": model.kind,
        "width": side,
        "height": side,
        "frames": case.frames,
        "fps": model.fps,
        "seed": SEED,
        "task": case.task,
        "warnings": [] if model.has_setting("prompt", case.task) else [NO_PROMPT.format(model.id)],
    }
    seen = {**file, "task": state["settings"]["task"], "warnings": state["warnings"]}
    yield from (f"{name} is {seen[name]!r}, not {value!r}" for name, value in wanted.items() if seen[name] != value)
    steps = model.fixed_steps if not model.has_setting("num_inference_steps", case.task) else case.proof.steps
    if not state["current_step"] == state["total_steps"] == (steps or 1):
        yield f"steps are {state['current_step']} of {state['total_steps']}, not {steps}"
