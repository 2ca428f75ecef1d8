"""The generation process: what starts in it, the one function it runs, and the translation of every fault.

Importing this module brings in neither torch nor diffusers, so that the daemon can name its functions; they are
imported inside `generate`, in phase `loading`.
"""

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from engine.catalog.models import Model
from engine.gpu import process
from engine.gpu.run.meter import Meter
from engine.job import (
    FAULT_BYTES,
    NO_TASK,
    PLAN_BYTES,
    Board,
    Cancelled,
    EngineConfig,
    EngineError,
    Job,
    Phase,
    Result,
    fingerprint,
)
from engine.planning.machine import Machine

if TYPE_CHECKING:
    from engine.gpu.session import ModelSession

log = logging.getLogger("wangpd.worker")
T = TypeVar("T")

_board: Board
_config: EngineConfig
_visible: str | None  # CUDA_VISIBLE_DEVICES as the daemon has it
_session: "ModelSession | None" = None


def start(board: Board, config: EngineConfig) -> None:
    """Make this process the worker of `board`. Trivial on purpose: an error in an initializer loses its message."""
    global _board, _config, _visible
    _board, _config, _visible = board, config, os.environ.get(process.VISIBLE)
    os.setsid()  # a group of its own: Ctrl-C is the daemon's to handle, and what it starts ends with it
    board.pid = os.getpid()
    process.prepare(config, config.device)


def generate(task_id: int, job: Job, model: Model) -> Result:
    """Run one job and return its files, which are still being written. Raises EngineError or Cancelled."""
    return _guarded(task_id, lambda session, meter: session.make(task_id, job, model, meter))


def warm(model: Model) -> None:
    """Load `model`, so that the next task of it need not. Raises EngineError."""
    _guarded(NO_TASK, lambda session, _meter: session.load(model, model.tasks[0]))


def _guarded(task_id: int, work: "Callable[[ModelSession, Meter], T]") -> T:
    """Do `work`; what it raises becomes one of the two exceptions that may cross the border.

    To unpickle an exception of torch, the daemon would have to import torch.
    """
    meter = Meter(_board, task_id)
    try:
        meter.enter(Phase.LOADING)
        return work(_opened(), meter)
    except BaseException as error:  # SystemExit too: it would cross the border and end the daemon
        fault = _for_the_daemon(error, task_id, meter.where)
    finally:
        _give_back()
        meter.done()
    raise fault  # only here, where `error` is gone: its frames hold the tensors of the job, and `fault` would keep it


def _for_the_daemon(error: BaseException, task_id: int, where: str) -> Exception:
    if isinstance(error, Cancelled):
        return Cancelled("by request")
    if isinstance(error, EngineError):
        return EngineError(error.message, error.code)
    log.exception("task %d: fault while %s", task_id, where)
    return _translated(error, where)


def _opened() -> "ModelSession":
    global _session
    if _session is None:
        from engine.gpu.session import ModelSession

        _session = ModelSession(_config, _settled, _visible)
        _tell(_session.machine())  # now, while no model takes anything of it
    return _session


def _tell(machine: Machine) -> None:
    _board.free_vram_bytes, _board.free_ram_bytes = machine.free_vram_bytes, machine.free_ram_bytes
    _board.link_bytes_per_s = machine.link_bytes_per_s
    _board.flops_per_s = machine.flops_per_s  # last: it says that the others are there


def _settled(fault: str) -> None:
    """The files of one more task are written, or not. In the background, where alone these fields are changed."""
    if fault:
        _board.fault, _board.unsaved = fault.encode()[:FAULT_BYTES], _board.saved + 1
    _board.saved += 1


def _give_back() -> None:
    if _session is None:
        return
    _show(_session)
    _session.give_back()


def _show(session: "ModelSession") -> None:
    """Say on the board which model is loaded, and where it lies."""
    loaded = fingerprint(session.model_id) if session.model_id else 0
    plan = f"{session.model_id}: {session.plan}".encode()[:PLAN_BYTES] if loaded else b""
    if (_board.loaded, _board.plan) != (loaded, plan):
        _board.loaded = 0  # meanwhile: the plan is read only beside a model
        _board.plan = plan
        _board.loaded = loaded


def _translated(error: BaseException, where: str) -> EngineError:
    """The sentence for a fault that nothing foresaw; the traceback is in the log."""
    for matches, make in _SENTENCES:
        if matches(error):
            return make(error, where)
    return EngineError(f"{type(error).__name__} while {where}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:300]


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)


def _out_of_memory(_: BaseException, where: str) -> EngineError:
    return EngineError(
        f"Out of memory while {where}. Try a smaller resolution or video_length, batch_size 1, or a higher profile in"
        " wangpd.toml.",
        "out_of_memory",
    )


def _disk_fault(error: BaseException, where: str) -> EngineError:
    assert isinstance(error, OSError)
    return EngineError(f"{error.strerror or _first_line(error)} while {where}.", "os_error")


def _missing_package(error: BaseException, _: str) -> EngineError:
    return EngineError(
        f"The generation process can't work: {_first_line(error)}. Install wangpd again.", "engine_unavailable"
    )


_SENTENCES: tuple[tuple[Callable[[BaseException], bool], Callable[[BaseException, str], EngineError]], ...] = (
    (_is_out_of_memory, _out_of_memory),
    (lambda error: isinstance(error, ImportError), _missing_package),
    (lambda error: isinstance(error, OSError) and error.errno is not None, _disk_fault),
)
