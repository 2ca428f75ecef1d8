"""A follower: a process of a team that holds the denoisers on its own device and computes each call with the lead."""

import logging
import time
from contextlib import ExitStack, nullcontext, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from engine.gpu import process
from engine.gpu.load import compiling, kernels, offloading, quantization
from engine.gpu.load.devices import choose_device, give_back
from engine.gpu.load.quantization import ModelSource
from engine.gpu.process import Rank
from engine.gpu.run import render
from engine.gpu.run.adapters import Adapters
from engine.gpu.team.sharing import Group
from engine.job import EngineConfig, EngineError, Job
from engine.planning.machine import Machine
from engine.planning.placement import Plan

log = logging.getLogger("wangpd.worker")
ANSWERED = ("measure", "load")  # the orders whose answer the lead waits for
GRACE_S = 5.0  # in which the lead notices by itself that a follower is gone


class Follower:
    """Carries out the lead's orders, each by the method of that name."""

    def __init__(self, connection: Connection, rank: Rank, config: EngineConfig) -> None:
        self._connection, self._rank, self._config = connection, rank, config
        self._pipe: Any = None
        self._adapters = Adapters()
        self._job = ExitStack()  # what is set for the job that runs

    def serve(self) -> None:
        """Report what this device can do, then carry out orders until the lead ends this process, or itself."""
        with suppress(EOFError), torch.no_grad():
            self._carry_out("measure", ())
            while True:
                self._carry_out(*self._connection.recv())

    def _carry_out(self, order: str, arguments: tuple[Any, ...]) -> None:
        """Send what an order of ANSWERED returns or raises; a fault at another one ends all processes."""
        try:
            answer = getattr(self, order)(*arguments)
        except Exception as fault:
            log.exception("%s: fault at '%s'", self._rank.device, order)
            kind = torch.OutOfMemoryError if isinstance(fault, torch.OutOfMemoryError) else EngineError
            plain = kind(f"{type(fault).__name__}: {fault}")  # can be pickled, whatever the fault holds
            answer = fault if isinstance(fault, EngineError) else plain
        if order in ANSWERED or answer:
            self._connection.send(answer)
        if order not in ANSWERED and answer:
            time.sleep(GRACE_S)  # the lead may have met the same fault, and then ends only its followers
            process.end_all()

    def measure(self) -> Machine:
        """Return what this device can do. Raises EngineError if it is not available."""
        self._device = choose_device(self._rank.device)
        return offloading.measure(self._device)

    def join(self) -> None:
        """Form the group; returns once all processes have joined."""
        self._group = Group(self._rank, self._device)

    def load(self, source: ModelSource, plan: Plan, kernel: str) -> None:
        """Load the denoisers, and place them as the lead does."""
        self.unload()
        self._model = source.model
        pipe, _ = quantization.load(source, self._device, self._config.models_dir, denoisers_only=True)
        if self._config.compile:
            compiling.compile_blocks(pipe)
        offloading.carry_out(pipe, plan, self._device)
        if not self._model.attention_backend:
            kernels.set_kernel(pipe, kernel, self._device, tokens=0, together=True)
        self._pipe = pipe

    def unload(self) -> None:
        """Drop the model."""
        self._pipe, self._adapters = None, Adapters()
        give_back(self._device)

    def begin(self, job: Job) -> None:
        """Prepare the denoisers for a job. `step` is the order after each denoising step, with how many are done."""
        prepared = render.prepared(self._pipe, self._model, job, self._adapters)
        pipe, self.step = self._job.enter_context(prepared)
        self._job.enter_context(self._group.shared(pipe))

    def call(self, name: str, blanks: Any, context: tuple[str, dict[str, Any]] | None) -> None:
        """Compute this device's share of a call of the denoiser `name`."""
        arguments, named = self._group.receive(blanks)
        denoiser = getattr(self._pipe, name)
        with denoiser.cache_context(context[0], **context[1]) if context else nullcontext():
            denoiser(*arguments, **named)

    def end(self) -> None:
        """The job is over, or has failed between two calls."""
        self._job.close()
        self._pipe.maybe_free_model_hooks()
        give_back(self._device)
