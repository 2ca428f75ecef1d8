"""The studio: the loaded model, kept warm from task to task, and the way of a job through it to its files."""

import gc
import logging
import resource
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine import fetch, request, weights
from engine import memory as plans
from engine.catalog import Model
from engine.gpu import attention, encode, memory, pipeline
from engine.gpu.adapters import Adapters
from engine.gpu.meter import Meter
from engine.gpu.results import Clip
from engine.job import Cancelled, EngineError, Job, OutputFile, Phase, Result
from engine.weights import Weights
from engine.work import Parts, Work

if TYPE_CHECKING:
    from engine.executor import EngineConfig

log = logging.getLogger("wangpd.worker")
IMAGE_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


class Studio:
    """Makes the files of one job after the other; holds at most one model."""

    def __init__(self, config: "EngineConfig") -> None:
        self._config = config
        self._device = choose_device(config.device)
        self._profile = config.profile
        self._tiled = False  # whatever vae_config says: memory has just run out
        self.model_id = ""  # of the model that is loaded
        self._pipe: Any = None
        self._adapters = Adapters()
        self._plan: plans.Plan | None = None
        self._parts: Parts | None = None

    def make(self, task_id: int, job: Job, model: Model, meter: Meter) -> Result:
        """Load what is not loaded, generate, and return the whole files.

        Out of memory, it gives everything back and tries once more with the next more frugal profile and the VAE in
        its smallest tiles. Raises EngineError or Cancelled.
        """
        started = datetime.now(UTC)
        try:
            return self._attempt(task_id, job, model, meter, started)
        except torch.OutOfMemoryError:
            frugal = memory.more_frugal(self._profile)
            log.warning("task %d: out of memory while %s; once more with profile %g", task_id, meter.where, frugal)
        self._unload()
        self._profile, self._tiled = frugal, True
        try:
            return self._attempt(task_id, job, model, meter, started)
        except torch.OutOfMemoryError:
            raise EngineError(memory.advice(job, model, meter.where, frugal), "out_of_memory") from None
        finally:
            self._unload()  # the next task may fit as configured
            self._profile, self._tiled = self._config.profile, False

    def _attempt(self, task_id: int, job: Job, model: Model, meter: Meter, started: datetime) -> Result:
        self._reset_peak()
        meter.enter(Phase.LOADING)
        pipe = pipeline.sibling(self.load(model, job.task, job), model.pipelines[job.task])
        files = []
        for clip in pipeline.render(pipe, model, job, meter, self._adapters):
            meter.enter(Phase.SAVING)
            files.append(self._save(task_id, job, clip, started))
            if meter.cancelled:  # while it was being written: who cancelled it wants no file
                (self._config.save_path / files[-1].filename).unlink(missing_ok=True)
                raise Cancelled
        plan = self._plan.describe() if self._plan else ""
        return Result(tuple(files), meter.done(), self._peak_bytes(), plan)

    def load(self, model: Model, task: str, job: Job | None = None) -> Any:
        """The pipeline of `model`, ready to run `job`; nothing happens if it is loaded and lies well for it."""
        work = Work.of(model, job) if job else Work.usual(model)
        if self.model_id != model.id or not (self._plan and plans.serves(self._plan, model, work, self._parts)):
            self._unload()  # first: two may not fit
            pipe = pipeline.load(model, model.pipelines[task], self._weights(model), self._device)
            self._parts = memory.parts_of(pipe, model)  # before they are placed: what lies elsewhere is not counted
            self._plan = memory.place(
                pipe, model, self._device, self._profile, self._config.vae_config, work=work, parts=self._parts
            )
            if self._tiled:
                memory.tile_vae(pipe, memory.SMALLEST_TILE)
            kernel = self._set_kernel(pipe, model, work.tokens)
            log.info("attention: %s", kernel)
            self.model_id, self._pipe = model.id, pipe
            log.info("loaded model %s on %s", model.id, self._device)
        return self._pipe

    def _set_kernel(self, pipe: Any, model: Model, tokens: int) -> str:
        if model.attention_backend:  # it was set when the model was loaded
            return model.attention_backend
        return attention.set_kernel(pipe, self._config.attention_mode, self._device, tokens)

    def _unload(self) -> None:
        self.model_id, self._pipe, self._adapters = "", None, Adapters()
        self._plan, self._parts = None, None
        self.give_back()

    def _weights(self, model: Model) -> Weights:
        found = weights.locate(model, self._config.models_dir)
        if found is None and self._config.allow_download:
            return self._fetched(model)
        if found is None:
            remedy = weights.remedy(model, self._config.models_dir)
            raise EngineError(f"Model '{model.id}' is not installed any more; {remedy}", "no_weights")
        return found

    def _fetched(self, model: Model) -> Weights:
        try:
            return fetch.fetch(model, self._config.models_dir)
        except fetch.FetchError as error:
            raise EngineError(f"Model '{model.id}' could not be downloaded: {error}", "no_weights") from error

    def _save(self, task_id: int, job: Job, clip: Clip, started: datetime) -> OutputFile:
        """Write one clip; it is seen in the output folder only when it is whole."""
        kind = "audio" if clip.frames is None else "image" if len(clip.frames) == 1 else "video"
        suffix = {
            "video": ".mp4",
            "image": IMAGE_SUFFIXES[self._config.image_format],
            "audio": f".{self._config.audio_format}",
        }[kind]
        suffix = f"_{clip.layer}{suffix}" if clip.layer else suffix
        path = self._config.save_path / encode.output_name(job, clip.seed, task_id, started, suffix)
        embedded = request.settings(job, clip.seed) if self._config.embed_settings else None
        _WRITERS[kind](path, clip, job, embedded, self._config)
        count, height, width, _ = (0, 0, 0, 0) if clip.frames is None else clip.frames.shape
        return OutputFile(path.name, kind, path.stat().st_size, width, height, count, job.fps, clip.seed)

    def give_back(self) -> None:
        """Return what no tensor holds any more to the card; after a fault too."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _peak_bytes(self) -> int:
        """The most memory in use at once: of the card, or on a CPU of this process since it started."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write_video(path: Path, clip: Clip, job: Job, settings: Any, config: "EngineConfig") -> None:
    assert clip.frames is not None
    sound = None if clip.sound is None else encode.Sound(clip.sound.numpy(), clip.sample_rate)
    crf, preset = config.video_crf, config.video_preset
    encode.write_video(path, clip.frames.numpy(), job.fps, settings, crf=crf, preset=preset, sound=sound)


def _write_image(path: Path, clip: Clip, _: Job, settings: Any, config: "EngineConfig") -> None:
    assert clip.frames is not None
    encode.write_image(path, clip.frames.numpy()[0], settings, config.image_format)


def _write_sound(path: Path, clip: Clip, _: Job, settings: Any, _config: "EngineConfig") -> None:
    assert clip.sound is not None
    encode.write_sound(path, encode.Sound(clip.sound.numpy(), clip.sample_rate), settings)


_WRITERS: Mapping[str, Callable[[Path, Clip, Job, Any, "EngineConfig"], None]] = {
    "video": _write_video,
    "image": _write_image,
    "audio": _write_sound,
}


def choose_device(wanted: str) -> torch.device:
    """The device for `wanted`; `auto` takes the best that is there. Raises EngineError if it is missing."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available.get(wanted.partition(":")[0], False):
        raise EngineError(f"device: '{wanted}' is not available on this machine; set device = \"auto\"", "no_device")
    return torch.device(wanted)
