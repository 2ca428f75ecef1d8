"""The session: the loaded model, kept from task to task, and how a job is turned into files with it."""

import gc
import logging
import resource
from concurrent.futures import wait
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from engine.capabilities import AUTO, NONE
from engine.catalog import fetch, weights
from engine.catalog.models import Model
from engine.catalog.weights import Weights
from engine.gpu.load import compiling, conversion, kernels, offloading, pipelines, quantization
from engine.gpu.load.devices import choose_device, give_back
from engine.gpu.load.quantization import ModelSource
from engine.gpu.run import decoding, prompts, render
from engine.gpu.run.adapters import Adapters
from engine.gpu.run.meter import Meter
from engine.gpu.save.saving import Made, Saved, Saver, Settled
from engine.gpu.team import sharing
from engine.gpu.team.lead import Team
from engine.job import STORAGE_FAULT, EngineConfig, EngineError, Job, Phase, Result
from engine.planning import placement as plans
from engine.planning.machine import Machine
from engine.planning.work import Parts, Work

log = logging.getLogger("wangpd.worker")


class ModelSession:
    """Makes the files of one job after the other; holds at most one model."""

    def __init__(self, config: EngineConfig, settled: Settled, made: Made, visible: str | None = None) -> None:
        """`visible` are the cards that a team can have, as CUDA_VISIBLE_DEVICES; None: all."""
        self._config, self._device = config, choose_device(config.device)
        self._team = Team(config, self._device, visible) if config.team else None
        self._profile, self._tiled = config.profile, False  # tiled whatever vae_config says, once memory has run out
        self._saver = Saver(config, settled, made)
        self._prompts = prompts.PromptCache(config.prompt_cache_mb * 2**20)
        self.model_id, self._adapters = "", Adapters()  # of the model that is loaded
        self._pipe: Any = None
        self._plan: plans.Plan | None = None
        self._parts: Parts | None = None
        self._helping: Team | None = None  # the team, if it computes what is loaded too

    def make(self, task_id: int, job: Job, model: Model, meter: Meter) -> Result:
        """Load what is not loaded, generate, and return the files, which are still being written.

        Out of memory, it tries once more, as frugal as it can be. Raises EngineError or Cancelled.
        """
        started = datetime.now(UTC)
        try:
            return self._attempt(task_id, job, model, meter, started)
        except torch.OutOfMemoryError:
            frugal = offloading.more_frugal(self._profile)
            log.warning("task %d: out of memory while %s; once more with profile %g", task_id, meter.where, frugal)
        self._unload()
        self._profile, self._tiled = frugal, True
        try:
            return self._attempt(task_id, job, model, meter, started)
        except torch.OutOfMemoryError:
            raise EngineError(offloading.advice(job, model, meter.where, frugal), "out_of_memory") from None
        finally:
            self._unload()  # the next task may fit as configured
            self._profile, self._tiled = self._config.profile, False

    def _attempt(self, task_id: int, job: Job, model: Model, meter: Meter, started: datetime) -> Result:
        if cuda := self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        meter.enter(Phase.LOADING)
        pipe = self.load(model, job.task, job)
        saved: list[Saved] = []
        try:
            together = self._helping.together if self._helping else None
            for clip in render.render(pipe, model, job, meter, loras=self._adapters, together=together):
                for file in saved:
                    file.require_well()  # else no more of them are made
                saved.append(self._saver.save(task_id, clip, job, started))
        except BaseException:
            wait([file.written for file in saved])  # nothing is written behind the daemon's back; what is whole stays
            raise
        # The most memory in use at once: of the card, or on a CPU of this process since it started.
        rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak_bytes = int(torch.cuda.max_memory_allocated(self._device)) if cuda else rss_bytes
        pending = self._saver.finish(saved)
        files, timings = tuple(file.file for file in saved), meter.done()
        return Result(files, timings, peak_bytes, self.plan, pending, meter.step_s)

    def load(self, model: Model, task: str, job: Job | None = None) -> Any:
        """The pipeline of `model`, ready to run `job`; nothing happens if it is loaded and placed well for it."""
        work = Work.of(model, job) if job else Work.usual(model)
        if self._serves(model, work):
            return self._pipe
        self._unload()  # first: two may not fit
        found, kind = self._weights(model), self._kind_of_weights(model, work)
        source = ModelSource(model, task, self._cast(found, model, kind), kind)
        pipe, parts = quantization.load(source, self._device, self._config.models_dir)
        self._prompts.attach(pipe, prompts.encoder_of(pipe, found))
        self._fit(pipe, parts, source, work)
        self.model_id, self._pipe = model.id, pipe
        gc.collect()
        gc.freeze()  # else half a million objects of the libraries are searched after each task: a third of a second
        log.debug("loaded model %s on %s", model.id, self._device)
        return pipe

    def _fit(self, pipe: Any, parts: Parts, source: ModelSource, work: Work) -> None:
        """Make the pipeline, which is in RAM, ready for `work` on the device, and let a team load the same."""
        model, machine = source.model, self.machine()
        shared = self._team is not None and model.context_parallel and sharing.splits(pipe, machine.cards)
        self._helping = self._team if shared else None
        decoding.set_precision(pipe, self._config.vae_precision, self._device)
        self._parts = replace(parts, vae_width=decoding.width_of(pipe))
        if self._config.compile:  # before they are placed: what places them hooks their blocks
            log.debug("compile: %d blocks, each kind once", compiling.compile_blocks(pipe))
        machine = machine if shared else replace(machine, cards=1)
        self._plan = self._planned(model, work, machine, source.kind, self._parts)
        log.debug("model %s: %s", model.id, self.plan)
        kernel = model.attention_backend or kernels.set_kernel(  # a model's own was set when it was loaded
            pipe, self._config.attention_mode, self._device, work.tokens, together=shared
        )
        log.debug("attention: %s", kernel)
        with self._helping.loading(source, self._plan, kernel) if self._helping else nullcontext():
            offloading.carry_out(pipe, self._plan, self._device)
        if self._tiled:
            offloading.tile_vae(pipe, min(plans.TILES.values()))

    def _serves(self, model: Model, work: Work) -> bool:
        """True if `model` is loaded, by the whole team if it is made together, and placed well for `work`."""
        if self.model_id != model.id or not self._plan or (self._helping and not self._helping.holds(model)):
            return False  # the last when the followers were ended
        return plans.serves(self._plan, model, work, self._parts)

    @property
    def plan(self) -> str:
        """Where the weights of the loaded model are, in a line; empty without one."""
        return self._plan.describe() if self._plan else ""

    def machine(self) -> Machine:
        """What is free of the device now, and how fast it is."""
        own = offloading.measure(self._device)
        return self._team.least(own) if self._team else own

    def _kind_of_weights(self, model: Model, work: Work) -> str:
        kind = self._config.transformer_quantization
        return quantization.kind_for(
            model, kind, lambda: self._planned(model, work, self.machine(), AUTO).placement.quantization
        )

    def _planned(self, model: Model, work: Work, machine: Machine, kind: str, parts: Parts | None = None) -> plans.Plan:
        """Where the model is to be for `work`, as configured. Raises EngineError if it fits nowhere."""
        tiles = self._config.vae_config
        return plans.plan(model, work, machine, profile=self._profile, vae_config=tiles, quantization=kind, parts=parts)

    def _unload(self) -> None:
        self.model_id, self._pipe, self._adapters = "", None, Adapters()
        self._plan, self._parts, self._helping = None, None, None
        if self._team:
            self._team.unload()
        gc.unfreeze()
        self.give_back()

    def _weights(self, model: Model) -> Weights:
        models_dir = self._config.models_dir
        if found := weights.locate(model, models_dir):
            return found
        if not self._config.allow_download:
            remedy = weights.remedy(model, models_dir)
            raise EngineError(f"Model '{model.id}' is not installed any more; {remedy}", "no_weights")
        try:
            return fetch.fetch(model, models_dir, wait=True)  # a worker beside this one may be at it
        except fetch.FetchError as error:
            code = STORAGE_FAULT if error.code == "disk_full" else "no_weights"
            raise EngineError(f"Model '{model.id}' could not be downloaded: {error}", code) from error

    def _cast(self, found: Weights, model: Model, kind: str) -> Weights:
        """The same weights, without float32 where the device computes in less."""
        if not self._config.convert_float32:
            return found

        def dtype_of(name: str) -> torch.dtype:
            quantized = kind != NONE and offloading.is_denoiser(name)  # stays: it has an entry of its own in the store
            return torch.float32 if quantized else pipelines.dtype_of(model, self._device, name)

        return conversion.cast(found, model.variant, dtype_of, self._config.models_dir)

    def give_back(self) -> None:
        """Return what no tensor holds any more to the card; after a fault too."""
        give_back(self._device)
