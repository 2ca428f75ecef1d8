"""The vocabulary of the process border: what the daemon and the generation process exchange. Standard library only."""

import ctypes
import signal
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

SEED_RANGE = 2**63  # torch takes more, JSON clients do not
GROUP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})  # end the daemon; some come to its group
NO_TASK = -1  # on the board while a model is loaded for no task; 0 would look cancelled


@dataclass(frozen=True)
class EngineConfig:
    """What the generation process needs to know for every job; the configuration takes its defaults from here."""

    save_path: Path
    models_dir: Path
    state_path: Path = Path("state")
    device: str = "auto"
    team: tuple[str, ...] = ()  # devices that compute each task together with `device`
    allow_download: bool = False
    embed_settings: bool = True
    image_format: Literal["png", "jpeg", "webp"] = "png"
    audio_format: Literal["wav", "flac", "mp3"] = "wav"
    video_crf: int = 18
    video_preset: str = "veryfast"
    video_encoder: str = "x264"
    vae_precision: str = "auto"
    profile: float = 0.0
    attention_mode: str = "auto"
    transformer_quantization: str = "none"
    vae_config: int = 0
    compile: bool = False
    convert_float32: bool = True
    prompt_cache_mb: int = 256  # of RAM; 0: off
    log_level: str = "info"
    save_mounted: bool = False  # save_path was a mount point when the daemon started
    instance: str = "000000"  # 6 hex digits, others for each state folder: in the names of its files


class Phase(IntEnum):
    """Where a running job is, in order."""

    IDLE = 0
    LOADING = 1
    ENCODING = 2
    DENOISING = 3
    DECODING = 4
    SAVING = 5

    @property
    def label(self) -> str:
        """`loading`, `encoding` …: the word for clients, sentences and timings."""
        return self.name.lower()


class Board(ctypes.Structure):
    """Progress and cancel, in memory shared by the daemon and one generation process.

    Integers, with one writer each, so no lock, which a killed worker could hold for ever: the daemon writes `cancel`,
    the worker all others. A cancel names its task, so a late one can't hit the next.
    """

    task: int
    phase: int
    run: int  # pass through the pipeline that is under way, from 0
    runs: int  # passes of the whole job
    step: int  # denoising steps done in this run
    total: int  # denoising steps of this run
    loaded: int  # `fingerprint` of the model that the worker holds, or 0
    cancel: int

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("task", "phase", "run", "runs", "step", "total", "loaded", "cancel")
    )


def fingerprint(model_id: str) -> int:
    """A model's id as a number other than 0, for the board."""
    return zlib.crc32(model_id.encode()) + 1


# Codes of faults that are not the task's: the device or its driver, and the disks.
ENGINE_FAULTS = frozenset({"no_device", "engine_unavailable"})
STORAGE_FAULT = "storage_fault"
DEVICE_FAULT = "device_fault"  # of the task, but it has left the process unfit for another one
STALE_PROCESS = "stale_process"  # the process was found unfit before the task began


class EngineError(Exception):
    """A fault that ends one task: a sentence for the user, and a code for programs. A library's text is cut."""

    def __init__(self, message: str, code: str = "generation_failed") -> None:
        self.message, self.code = message[:2000], code
        super().__init__(self.message, code)  # both in args, so that the exception survives pickling

    def __str__(self) -> str:
        return self.message


class Cancelled(Exception):
    """The task was cancelled, and its work has really ended."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file, and for each phase of guidance its strengths, spread evenly over the steps."""

    path: Path
    phases: tuple[tuple[float, ...], ...] = ((1.0,),)


@dataclass(frozen=True)
class Job:
    """One request with everything decided: nothing in it is left to a default or to chance."""

    model: str
    task: str  # the catalogue's word: t2v, i2v, flf2v, vace …
    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int  # 1: a picture, 0: sound
    fps: int
    steps: int
    guidance_scale: float | None
    embedded_guidance_scale: float
    flow_shift: float | None
    seed: int  # of file i: seed + i
    guidance2_scale: float | None = None
    batch_size: int = 1
    repeat_generation: int = 1
    denoising_strength: float | None = None
    duration_s: float | None = None
    lyrics: str = ""
    skip_steps_cache_type: str = ""  # one of engine.catalog.abilities.STEP_CACHES, or none
    skip_steps_multiplier: float = 1.75
    skip_steps_start_step_perc: float = 0.0
    window_frames: int = 0  # the most of a sliding window; 0: the whole video at once
    window_overlap: int = 0
    color_correction: float = 0.0  # 0 to 1, of each window after the one before
    loras: tuple[Lora, ...] = ()
    inputs: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)  # name (`image_start` …) → files, at least one
    settings: Mapping[str, Any] = field(default_factory=dict)  # without a field here, by name, as JSON values


@dataclass(frozen=True)
class OutputFile:
    """A whole file in the output folder; 0 for what it lacks: size, frames and rate of sound, rate of a picture."""

    filename: str
    type: str  # video, image, audio
    size_bytes: int
    width: int
    height: int
    frames: int
    fps: int
    seed: int


@dataclass(frozen=True)
class Result:
    """What a finished job returns, as soon as the next one can be made: its files may still be being written.

    They are whole once the worker has reported job number `pending` as settled; until then their sizes are 0.
    """

    files: tuple[OutputFile, ...]
    timings: Mapping[str, float]  # seconds by the label of the phase
    peak_memory_bytes: int
    plan: str = ""  # where the weights were, in a line
    pending: int = 0  # 0: the files are whole
    step_s: float = 0.0  # of a usual denoising step; 0: too few were made to know it
