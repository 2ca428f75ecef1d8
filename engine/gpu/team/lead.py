"""A team: the worker and its followers, processes on other devices that compute every call of a denoiser with it.

The worker leads. It alone encodes prompts, draws noise, decodes and saves; a follower gets the arguments of each call
and computes its share (see `sharing`), so a task can be cancelled between any two calls. A fault within a call leaves
the others waiting: the followers are ended, and started again for the next task.
"""

import itertools
import logging
import multiprocessing
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from engine.catalog.models import Model
from engine.gpu import process
from engine.gpu.load import offloading
from engine.gpu.load.quantization import ModelSource
from engine.gpu.process import Rank
from engine.gpu.team.entry import follow
from engine.gpu.team.follower import GRACE_S
from engine.gpu.team.sharing import Group, blanked
from engine.job import EngineConfig, EngineError, Job
from engine.planning.machine import Machine
from engine.planning.placement import Plan

log = logging.getLogger("wangpd.worker")


class Team:
    """The lead's side. Its followers are started with it, and again when they are needed after their end."""

    def __init__(self, config: EngineConfig, device: torch.device, visible: str | None) -> None:
        """`visible` is CUDA_VISIBLE_DEVICES as it was before the worker chose its own card."""
        self._config, self._device, self._visible = config, device, visible
        self._starts = itertools.count()  # each has its own rendezvous file: torch may delete the last one's late
        self._followers: list[tuple[Any, Connection]] = []
        self._machines: list[Machine] = []
        self._group: Group | None = None
        self._model_id = ""  # of what all followers hold
        self._in_step = True  # all wait for the lead; else some may wait for each other
        self._start()

    def _start(self) -> None:
        config, spawn = self._config, multiprocessing.get_context("spawn")
        folder = config.state_path / "team"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._rank = Rank(0, 1 + len(config.team), config.device, folder / f"rendezvous-{next(self._starts)}")
        for number, device in enumerate(config.team, 1):
            ours, theirs = spawn.Pipe()
            arguments = (theirs, replace(self._rank, number=number, device=device), config, self._visible)
            follower = spawn.Process(target=follow, args=arguments, name=f"follower {number}", daemon=True)
            follower.start()
            theirs.close()  # so that its end is seen at ours
            self._followers.append((follower, ours))
        self._ended = threading.Event()
        self._sentinels = [follower.sentinel for follower, _ in self._followers]
        threading.Thread(target=_watch, args=(self._sentinels, self._ended), name="team", daemon=True).start()

    def _joined(self) -> Group:
        if not self._followers:
            self._start()
        if self._group is None:
            try:
                self._machines = self._answers()
                self._order("join")
                self._group = Group(self._rank, self._device)
            except Exception:
                self.close()  # the next task tries again
                raise
        return self._group

    def close(self) -> None:
        """End the followers at once; nothing happens if there are none."""
        self._ended.set()
        for follower, connection in self._followers:
            follower.kill()
            follower.join()
            connection.close()
        if self._group:
            self._group.leave()
        self._followers, self._group, self._model_id, self._in_step = [], None, "", True

    def least(self, machine: Machine) -> Machine:
        """What every process of the team can use; they share the RAM. `machine` is the lead's."""
        self._joined()
        least, count = Machine(*map(min, astuple(machine), *map(astuple, self._machines))), self._rank.count
        return replace(least, free_ram_bytes=least.free_ram_bytes // count, cards=count)

    @contextmanager
    def loading(self, source: ModelSource, plan: Plan, kernel: str) -> Iterator[None]:
        """Within the block the followers load too; after it, all have. Raises EngineError or OutOfMemoryError."""
        self._joined()
        self._order("load", source, plan, kernel)
        try:
            yield
        except BaseException:
            self.close()  # what they still answer would be taken for the answer to a later order
            raise
        self._answers()
        self._model_id = source.model.id

    def holds(self, model: Model) -> bool:
        """True if the followers have loaded `model`."""
        return self._model_id == model.id

    def unload(self) -> None:
        """Let the followers drop their model."""
        self._model_id = ""
        if self._group:
            self._order("unload")

    @contextmanager
    def together(self, pipe: Any, job: Job, set_strengths: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
        """Within, all compute each call of the denoisers, prepared for `job`. Yields what replaces `set_strengths`."""

        def after_step(done: int) -> None:
            set_strengths(done)
            self._order("step", done)

        try:
            self._order("begin", job)
            self._in_step = False
            with self._joined().shared(pipe), self._followed(pipe):
                self._in_step = True
                yield after_step
        finally:
            if self._in_step:
                self._order("end")
            else:  # the followers still wait in the call that has failed
                if wait(self._sentinels, 0.5):  # the connections of a process are closed a little before it is dead
                    self._ended.wait(GRACE_S)  # for `_watch`, which is about to end this process too
                log.warning("a call of the denoiser has failed: the other processes of the team are ended")
                self.close()

    @contextmanager
    def _followed(self, pipe: Any) -> Iterator[None]:
        """Within the block the followers are ordered to compute each call of a denoiser before the lead begins it."""
        contexts: dict[str, Any] = {}  # the last pass of guidance (cond, uncond …) of each: step caches depend on it

        def begin_call(name: str, _: Any, arguments: Any, named: Any) -> None:
            self._order("call", name, blanked((arguments, named)), contexts.get(name))
            self._in_step = False
            self._joined().send((arguments, named))

        def end_call(*_: Any) -> None:
            self._in_step = True

        def cache_context(name: str, plain: Any, context: str, **where: Any) -> Any:
            contexts[name] = (context, where)
            return plain(context, **where)

        denoiser: Any
        with ExitStack() as hooks:
            for name, denoiser in offloading.denoisers(pipe).items():
                hooks.enter_context(denoiser.register_forward_pre_hook(partial(begin_call, name), with_kwargs=True))
                hooks.enter_context(denoiser.register_forward_hook(end_call))
                if plain := getattr(denoiser, "cache_context", None):
                    denoiser.cache_context = partial(cache_context, name, plain)
                    hooks.callback(delattr, denoiser, "cache_context")  # the instance's, which hides the class's
            yield

    def _order(self, name: str, *arguments: Any) -> None:
        """Give all followers an order. Raises EngineError if one has failed at an earlier one; then all are ended."""
        for follower, connection in self._followers:
            with self._reaching():
                if connection.poll():  # all that it sends unasked is a fault
                    fault = connection.recv()
                    self.close()
                    raise EngineError(f"{follower.name}: {fault}")
                connection.send((name, arguments))

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """A follower that can't be reached is dead, and `_watch` about to end this process too."""
        try:
            yield
        except (EOFError, ConnectionError):
            self._ended.wait(GRACE_S)
            raise EngineError("A process of the team has died.", "worker_died") from None

    def _answers(self) -> list[Any]:
        """Each follower's answer to the last order that has one. Raises the fault that one answers."""
        with self._reaching():
            answers = [connection.recv() for _, connection in self._followers]
        if fault := next((answer for answer in answers if isinstance(answer, Exception)), None):
            raise fault
        return answers


def _watch(sentinels: list[int], ended: threading.Event) -> None:
    """End this process too when a follower dies: a card that waits for another's tensors does not notice."""
    wait(sentinels)
    if not ended.is_set():
        log.error("a process of the team has died, and with it the whole team ends")
        process.end_all()
