"""The studio: the loaded model, kept warm from task to task, and the way of a job through it to its files."""

import gc
import logging
import resource
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from engine import catalog, weights
from engine.catalog import Model
from engine.gpu import encode, memory, pipeline
from engine.gpu.meter import Meter
from engine.job import Cancelled, EngineError, Job, OutputFile, Phase, Result
from engine.weights import Weights

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
        pipe = pipeline.sibling(self.load(model, job.task), model.pipelines[job.task])
        files = []
        for clip in pipeline.render(pipe, model, job, meter):
            meter.enter(Phase.SAVING)
            files.append(self._save(task_id, job, clip, started))
            if meter.cancelled:  # while it was being written: who cancelled it wants no file
                (self._config.save_path / files[-1].filename).unlink(missing_ok=True)
                raise Cancelled
        return Result(tuple(files), meter.done(), self._peak_bytes())

    def load(self, model: Model, task: str) -> Any:
        """The pipeline of `model`, ready to run; nothing happens if it is loaded."""
        if self.model_id != model.id:
            self._unload()  # first: two may not fit
            pipe = pipeline.load(model, model.pipelines[task], self._weights(model), self._device)
            memory.place(pipe, model, self._device, self._profile, self._config.vae_config)
            if self._tiled:
                memory.tile_vae(pipe, memory.SMALLEST_TILE)
            self.model_id, self._pipe = model.id, pipe
            log.info("loaded model %s on %s", model.id, self._device)
        return self._pipe

    def _unload(self) -> None:
        self.model_id, self._pipe = "", None
        self.give_back()

    def _weights(self, model: Model) -> Weights:
        found = weights.locate(model, self._config.models_dir)
        if found is None and self._config.allow_download:
            return weights.download(model, self._config.models_dir)
        if found is None:
            command = weights.install_command(model, self._config.models_dir)
            raise EngineError(f"Model '{model.id}' is not installed any more. Install it with: {command}", "no_weights")
        return found

    def _save(self, task_id: int, job: Job, clip: pipeline.Clip, started: datetime) -> OutputFile:
        """Write one clip; it is seen in the output folder only when it is whole."""
        frames = clip.frames.numpy()
        still = len(frames) == 1
        suffix = IMAGE_SUFFIXES[self._config.image_format] if still else ".mp4"
        path = self._config.save_path / encode.output_name(job, clip.seed, task_id, started, suffix)
        embedded = catalog.settings(job, clip.seed) if self._config.embed_settings else None
        if still:
            encode.write_image(path, frames[0], embedded, self._config.image_format)
        else:
            crf, preset = self._config.video_crf, self._config.video_preset
            encode.write_video(path, frames, job.fps, embedded, crf=crf, preset=preset)
        count, height, width, _ = frames.shape
        kind = "image" if still else "video"
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


def choose_device(wanted: str) -> torch.device:
    """The device for `wanted`; `auto` takes the best that is there. Raises EngineError if it is missing."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available.get(wanted.partition(":")[0], False):
        raise EngineError(f"device: '{wanted}' is not available on this machine; set device = \"auto\"", "no_device")
    return torch.device(wanted)
