"""The generation process: its start, the two functions that it runs, and the translation of every fault.

Importing this module brings in neither torch nor diffusers, so that the daemon can name its functions; they are
imported inside `generate`, in phase `loading`.
"""

import errno
import json
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.catalog.models import Model
from engine.gpu import process
from engine.gpu.run.meter import Meter
from engine.job import (
    DEVICE_FAULT,
    NO_TASK,
    STALE_PROCESS,
    STORAGE_FAULT,
    Board,
    Cancelled,
    EngineConfig,
    EngineError,
    Job,
    OutputFile,
    Phase,
    Result,
    fingerprint,
)
from engine.quiet import without_paths

if TYPE_CHECKING:
    from engine.gpu.session import ModelSession

log = logging.getLogger("wangpd.worker")
T = TypeVar("T")
MOST_REPORTED = 300  # characters of a sentence: as JSON, up to twelve bytes each
LOST_DISK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN}
)
LOST_FOLDER = LOST_DISK | {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM}
# What torch, cuBLAS and cuDNN say where a card has failed; its context then fails every later call.
DEVICE_WORDS = re.compile(r"AcceleratorError|(CUDA|HIP|cuDNN) error|device-side assert|CU(BLAS|DNN|SPARSE|FFT)_STATUS_")

_board: Board
_config: EngineConfig
_visible: str | None  # CUDA_VISIBLE_DEVICES as the daemon has it
_session: "ModelSession | None" = None
_reports: Connection
_settled_count = 0
_folders: dict[str, Path] = {}  # by configuration key, which sentences name in their place
_unfit = False  # the device has failed: nothing works in this process any more


def start(board: Board, reports: Connection, config: EngineConfig) -> None:
    """Make this process the worker of `board`. Trivial on purpose: an error in an initializer loses its message."""
    global _board, _reports, _config, _visible
    _board, _reports, _config, _visible = board, reports, config, os.environ.get(process.VISIBLE)
    _folders.update({name: getattr(config, name) for name in ("save_path", "state_path", "models_dir")})
    os.setsid()  # a group of its own: Ctrl-C is the daemon's to handle, and what it starts ends with it
    process.ignore_signals()
    process.prepare(config, config.device, _visible)


def generate(task_id: int, job: Job, model: Model) -> Result:
    """Run one job and return its files, which are still being written. Raises EngineError or Cancelled."""
    return _guarded(task_id, lambda session, meter: session.make(task_id, job, model, meter))


def warm(model: Model) -> None:
    """Load `model`, so that the next task of it need not. Raises EngineError."""
    _guarded(NO_TASK, lambda session, _meter: session.load(model, model.tasks[0]))


def check() -> None:
    """Raises EngineError if the device can't work."""
    _guarded(NO_TASK, lambda _session, _meter: None)


def _guarded(task_id: int, work: "Callable[[ModelSession, Meter], T]") -> T:
    """Do `work`. Raises EngineError and Cancelled only: to unpickle one of torch's, the daemon would import torch."""
    global _unfit
    if _unfit:
        raise EngineError("The device failed after the task before.", STALE_PROCESS)
    meter, fault = Meter(_board, task_id), None
    try:
        meter.enter(Phase.LOADING)
        done = work(_opened(), meter)
    except BaseException as error:  # SystemExit too: it would cross the border and end the daemon
        fault = _for_daemon(error, task_id, meter.where)
    try:
        _give_back()
    except Exception:  # of a device that has failed: each call raises from now on
        log.exception("task %d: the memory of the device can't be given back", task_id)
        _unfit = True
    finally:
        meter.done()
    if fault:  # only here, where `error` is gone: its frames hold the tensors of the job, and `fault` would keep it
        raise fault
    return done


def _for_daemon(error: BaseException, task_id: int, where: str) -> Exception:
    if isinstance(error, Cancelled):
        return Cancelled("by request")
    if isinstance(error, EngineError):
        sentence, code = error.message, error.code
        log.debug("task %d: %s", task_id, sentence)
    else:
        log.exception("task %d: fault while %s", task_id, where, exc_info=error)
        sentence, code = _sentence_and_code(error, where)
    return EngineError(without_paths(sentence, _folders), code)


def _sentence_and_code(error: BaseException, where: str) -> tuple[str, str]:
    kind, first_line = type(error).__name__, (str(error).strip() or "no message").splitlines()[0][:300]
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        remedy = "Try a smaller resolution or video_length, batch_size 1, or a higher profile in wangpd.toml."
        return f"Out of memory while {where}. {remedy}", "out_of_memory"
    if isinstance(error, ImportError):
        return f"The generation process can't work: {first_line}. Install wangpd again.", "engine_unavailable"
    if isinstance(error, OSError) and error.errno is not None:
        storage = error.errno in (LOST_FOLDER if where == Phase.SAVING.label else LOST_DISK)
        return f"{error.strerror or first_line} while {where}.", STORAGE_FAULT if storage else "os_error"
    if DEVICE_WORDS.search(f"{kind}: {first_line}"):
        return f"The device failed while {where}: {first_line}", DEVICE_FAULT
    return f"{kind} while {where}: {first_line}", "generation_failed"


def _opened() -> "ModelSession":
    global _session
    if _session is None:
        from engine.gpu.session import ModelSession

        _session = ModelSession(_config, _settled, _made, _visible)
        _report(machine=vars(_session.machine()))  # now, while no model takes anything of it
    return _session


def _settled(fault: BaseException | None) -> None:
    """Report that the files of one more job are written, or given up for this reason. Called in one thread only."""
    global _settled_count
    _settled_count += 1
    known = _for_daemon(fault, NO_TASK, Phase.SAVING.label) if fault else None
    _report(settled=_settled_count, fault=str(known or "")[:MOST_REPORTED], code=getattr(known, "code", ""))


def _made(task_id: int, file: OutputFile) -> None:
    """Report a file that is whole."""
    _report(made=vars(file), task=task_id)


def _report(**values: Any) -> None:
    """Send values to engine.workers.reports: one write of less than PIPE_BUF (4,096 bytes) is whole without a lock."""
    with suppress(BrokenPipeError):  # the daemon is gone, and this process is about to be
        os.write(_reports.fileno(), json.dumps(values).encode() + b"\n")


def _give_back() -> None:
    if _session is None:
        return
    _board.loaded = fingerprint(_session.model_id) if _session.model_id else 0
    _report(plan=f"{_session.model_id}: {_session.plan}"[:MOST_REPORTED] if _session.model_id else "")
    _session.give_back()
