"""The generation process: its start, the two functions that it runs, and the translation of every fault.

Importing this module brings in neither torch nor diffusers, so that the daemon can name its functions; they are
imported inside `generate`, in phase `loading`.
"""

import json
import logging
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar

from engine.catalog.models import Model
from engine.gpu import process
from engine.gpu.run.meter import Meter
from engine.job import NO_TASK, Board, Cancelled, EngineConfig, EngineError, Job, Phase, Result, fingerprint

if TYPE_CHECKING:
    from engine.gpu.session import ModelSession

log = logging.getLogger("wangpd.worker")
T = TypeVar("T")
MOST_REPORTED = 300  # characters of a sentence: as JSON, up to twelve bytes each

_board: Board
_config: EngineConfig
_visible: str | None  # CUDA_VISIBLE_DEVICES as the daemon has it
_session: "ModelSession | None" = None
_reports: Connection
_settled_count = 0


def start(board: Board, reports: Connection, config: EngineConfig) -> None:
    """Make this process the worker of `board`. Trivial on purpose: an error in an initializer loses its message."""
    global _board, _reports, _config, _visible
    _board, _reports, _config, _visible = board, reports, config, os.environ.get(process.VISIBLE)
    os.setsid()  # a group of its own: Ctrl-C is the daemon's to handle, and what it starts ends with it
    process.release_signals()
    process.prepare(config, config.device, _visible)


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
        fault = _for_daemon(error, task_id, meter.where)
    finally:
        _give_back()
        meter.done()
    raise fault  # only here, where `error` is gone: its frames hold the tensors of the job, and `fault` would keep it


def _for_daemon(error: BaseException, task_id: int, where: str) -> Exception:
    if isinstance(error, Cancelled):
        return Cancelled("by request")
    if isinstance(error, EngineError):
        return EngineError(error.message, error.code)
    log.exception("task %d: fault while %s", task_id, where)
    first_line = (str(error).strip() or "no message").splitlines()[0][:300]
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return EngineError(
            f"Out of memory while {where}. Try a smaller resolution or video_length, batch_size 1, or a higher profile"
            " in wangpd.toml.",
            "out_of_memory",
        )
    if isinstance(error, ImportError):
        sentence = f"The generation process can't work: {first_line}. Install wangpd again."
        return EngineError(sentence, "engine_unavailable")
    if isinstance(error, OSError) and error.errno is not None:
        return EngineError(f"{error.strerror or first_line} while {where}.", "os_error")
    return EngineError(f"{type(error).__name__} while {where}: {first_line}")


def _opened() -> "ModelSession":
    global _session
    if _session is None:
        from engine.gpu.session import ModelSession

        _session = ModelSession(_config, _settled, _visible)
        _report(machine=vars(_session.machine()))  # now, while no model takes anything of it
    return _session


def _settled(fault: str) -> None:
    """Report that the files of one more job are written, or given up for this reason. Called in one thread only."""
    global _settled_count
    _settled_count += 1
    _report(settled=_settled_count, fault=fault[:MOST_REPORTED])


def _report(**values: Any) -> None:
    """Send values to engine.workers.reports: one write of less than PIPE_BUF (4,096 bytes) is whole without a lock."""
    os.write(_reports.fileno(), json.dumps(values).encode() + b"\n")


def _give_back() -> None:
    if _session is None:
        return
    _board.loaded = fingerprint(_session.model_id) if _session.model_id else 0
    _report(plan=f"{_session.model_id}: {_session.plan}"[:MOST_REPORTED] if _session.model_id else "")
    _session.give_back()
