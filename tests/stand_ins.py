"""What a test puts in the place of the worker's `generate`: real processes that misbehave in a known way.

A job's prompt names the phase in which the stand-in does what it does, or the fault in which it ends.
"""

import asyncio
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from engine.catalog.models import Catalog, Model
from engine.gpu import worker
from engine.gpu.run.meter import Meter
from engine.job import DEVICE_FAULT, STORAGE_FAULT, EngineConfig, EngineError, Job, OutputFile, Phase, Result
from engine.workers.local import Engine

DEMO = Catalog.load().get("wan_demo")
DONE = Result((), {}, 0)
FOR_EVER_S = 600
HEAVY = ("libtorch", "numpy", "diffusers")  # what the daemon's process must never map


def job(prompt: str = "", **changes: Any) -> Job:
    """A job that only a stand-in reads."""
    plain: dict[str, Any] = {
        "model": DEMO.id,
        "task": "t2v",
        "prompt": prompt,
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "frames": 9,
        "fps": 8,
        "steps": 20,
        "guidance_scale": 1.0,
        "embedded_guidance_scale": 0.0,
        "flow_shift": None,
        "seed": 1,
    }
    return Job(**plain | changes)


def arrived(task_id: int, job: Job) -> Meter:
    """Be in the phase that the prompt names, at step 7 of 20."""
    meter = Meter(worker._board, task_id)
    meter.begin_run(0, 1, job.steps)
    meter.step_done(7)
    meter.enter(Phase[job.prompt.upper()])
    return meter


def obey(task_id: int, job: Job, _model: Model) -> Result:
    """Stay in the phase until it is cancelled."""
    meter = arrived(task_id, job)
    while True:
        meter.check()
        time.sleep(0.01)


def ignore(task_id: int, job: Job, _model: Model) -> Result:
    """Stay in the phase and look at nothing."""
    arrived(task_id, job)
    time.sleep(FOR_EVER_S)
    return DONE


def be_quick(_task_id: int, _job: Job, _model: Model) -> Result:
    """Be done."""
    return DONE


def never_save(_task_id: int, _job: Job, _model: Model) -> Result:
    """Be done, but for files that are never written."""
    return Result((), {}, 0, pending=1)


def save_late(_task_id: int, _job: Job, _model: Model) -> Result:
    """Be done, and report that the files are written after two seconds."""
    threading.Timer(2.0, worker._settled, ("",)).start()
    return Result((), {}, 0, pending=worker._settled_count + 1)


def save_half(task_id: int, _job: Job, _model: Model) -> Result:
    """Report one whole file, and find no room for the next."""
    worker._made(task_id, OutputFile("half.png", "image", 1, 64, 64, 1, 8, 1))
    raise EngineError("No space left on device while saving.", STORAGE_FAULT)


def save_all(task_id: int, _job: Job, _model: Model) -> Result:
    """Report the only file as whole."""
    file = OutputFile("whole.png", "image", 1, 64, 64, 1, 8, 1)
    worker._made(task_id, file)
    worker._settled(None)
    return Result((file,), {}, 0, pending=worker._settled_count)


def lose_the_device(_task_id: int, _job: Job, _model: Model) -> Result:
    """Leave the process unfit for work."""
    raise EngineError("The device failed while denoising: CUDA error", DEVICE_FAULT)


def fail_at_length(_task_id: int, _job: Job, _model: Model) -> Result:
    """End in a fault whose sentence is a megabyte long."""
    raise EngineError("e" * 2**20)


def raise_at_length(_task_id: int, _job: Job, _model: Model) -> Result:
    """End in an exception that the worker did not translate, with a megabyte of text."""
    raise ValueError("v" * 2**20)


def break_at_length(task_id: int, _job: Job, _model: Model) -> Result:
    """The worker's own `generate`, in which a library raises an exception with a megabyte of text."""

    def broken(*_: Any) -> Result:
        raise RuntimeError("r" * 2**20)

    worker._session = BrokenStudio()  # type: ignore[assignment]
    return worker._guarded(task_id, broken)


def step_slowly(task_id: int, job: Job, _model: Model) -> Result:
    """Take a tenth of a second for each step, and nothing for all else; the first of a process loads for a second."""
    meter = Meter(worker._board, task_id)
    meter.enter(Phase.LOADING)
    if worker._session is None:
        time.sleep(1)
        worker._session = BrokenStudio()  # type: ignore[assignment]
    meter.begin_run(0, 1, job.steps)
    meter.enter(Phase.DENOISING)
    for step in range(job.steps):
        time.sleep(0.1)
        meter.step_done(step + 1)
    return Result((), meter.done(), 0, step_s=meter.step_s)


def run_out_of_memory_once(task_id: int, job: Job, model: Model) -> Result:
    """The worker's own `generate`, whose first call of a denoiser's block finds no memory."""
    import torch

    def exhausted(*_: Any) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory")

    session = worker._opened()
    hook = session.load(model, job.task, job).transformer.blocks[1].register_forward_pre_hook(exhausted)
    return worker._guarded(task_id, lambda session, meter: session.make(task_id, job, model, meter))


def run_out_of_memory_while_placing(task_id: int, job: Job, model: Model) -> Result:
    """The worker's own `generate`, which finds no memory for the weights when it first places them."""
    import torch

    from engine.gpu.load import offloading

    plain = offloading.carry_out

    def exhausted(*_: Any) -> None:
        offloading.carry_out = plain
        raise torch.OutOfMemoryError("CUDA out of memory")

    offloading.carry_out = exhausted
    return worker._guarded(task_id, lambda session, meter: session.make(task_id, job, model, meter))


def tell_cards(_task_id: int, _job: Job, _model: Model) -> Result:
    """Be done, with the cards that this process sees in the place of the plan."""
    return Result((), {}, 0, os.environ["CUDA_VISIBLE_DEVICES"])


def need_the_cpu(_task_id: int, _job: Job, _model: Model) -> Result:
    """Be done on a CPU, and find no other device."""
    if worker._config.device != "cpu":
        raise EngineError("There is no such card.", "no_device")
    return DONE


def take_a_moment(task_id: int, job: Job, _model: Model) -> Result:
    """Be done after a second, unless it is cancelled."""
    meter = arrived(task_id, job)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        meter.check()
        time.sleep(0.01)
    return DONE


def exit_at_once(task_id: int, job: Job, _model: Model) -> Result:
    """End the process as a library's `exit` would."""
    arrived(task_id, job)
    os._exit(3)


def crash(task_id: int, job: Job, _model: Model) -> Result:
    """Die as of a fault in a kernel."""
    arrived(task_id, job)
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(FOR_EVER_S)
    return DONE


class Unpicklable(Exception):
    """What can't cross a process border."""

    def __init__(self) -> None:
        super().__init__("can't be sent", lambda: None)


def _with_tensor() -> BaseException:
    import torch

    return RuntimeError(torch.zeros(3), "a fault with a tensor in it")


FAULTS = {
    "tensor": _with_tensor,
    "unpicklable": Unpicklable,
    "exit": lambda: SystemExit(1),
    "interrupt": KeyboardInterrupt,
    "memory": MemoryError,
    "disk": lambda: OSError(28, "No space left on device", "/secret/path"),
    "import": lambda: ImportError("No module named 'ftfy'"),
    "sentence": lambda: EngineError("Nothing works today.", "own_code"),
    "no words": RuntimeError,
    "many lines": lambda: ValueError("first line\nsecond line"),
}


class BrokenStudio:
    """A session in which every job ends in the fault that its prompt names."""

    model_id = ""

    def make(self, _task_id: int, job: Job, _model: Model, meter: Meter) -> Result:
        """Raise it, while denoising."""
        meter.enter(Phase.DENOISING)
        raise FAULTS[job.prompt]()

    def give_back(self) -> None:
        """Nothing to give."""


REAL_GENERATE = worker.generate


def fail(task_id: int, job: Job, model: Model) -> Result:
    """The worker's own `generate`, with a session that fails."""
    worker._session = BrokenStudio()  # type: ignore[assignment]
    return REAL_GENERATE(task_id, job, model)


def config(folder: Path, device: str = "auto", team: tuple[str, ...] = ()) -> EngineConfig:
    """A configuration for an engine without a daemon, which makes the state folder."""
    (folder / "state").mkdir(exist_ok=True)
    return EngineConfig(save_path=folder, models_dir=folder, state_path=folder / "state", device=device, team=team)


async def _told(engine: Engine, task_id: int, fault: str) -> str:
    try:
        await engine.run(task_id, job(fault), DEMO, math.inf)
    except EngineError as error:
        return error.message
    return "no fault"


async def _fail_all(names: list[str]) -> dict[str, str]:
    engine = Engine(config(Path.cwd()))
    sentences = {name: await _told(engine, number, name) for number, name in enumerate(names, 1)}
    engine.close()
    return sentences


def fail_in_a_fresh_process() -> None:
    """Run every fault that `sys.argv` names; print the sentences, and what heavy libraries that brought in."""
    worker.generate = fail
    sentences = asyncio.run(_fail_all(sys.argv[1:]))
    mapped = Path("/proc/self/maps").read_text()
    print(json.dumps({"sentences": sentences, "heavy": [name for name in HEAVY if name in mapped]}))
