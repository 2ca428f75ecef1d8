"""The generation process: what starts in it, the one function it runs, and the translation of every fault.

Importing this module brings in neither torch nor diffusers, so that the daemon can name its functions; they are
imported inside `generate`, in phase `loading`.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, TypeVar

from engine.catalog import Model
from engine.gpu.meter import Meter
from engine.job import NO_TASK, Board, Cancelled, EngineError, Job, Phase, Result, fingerprint

if TYPE_CHECKING:
    from engine.executor import EngineConfig
    from engine.gpu.studio import Studio

log = logging.getLogger("wangpd.worker")
T = TypeVar("T")

_board: Board
_config: "EngineConfig"
_studio: "Studio | None" = None


def start(board: Board, config: "EngineConfig") -> None:
    """Make this process the worker of `board`. Trivial on purpose: an error in an initializer loses its message."""
    global _board, _config
    _board, _config = board, config
    os.setsid()  # a group of its own: Ctrl-C is the daemon's to handle, and ffmpeg ends with its worker
    board.pid = os.getpid()
    logging.basicConfig(stream=sys.stderr, level=config.log_level.upper(), format="%(name)s: %(message)s")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false", DIFFUSERS_VERBOSITY="error")
    if not config.allow_download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    threading.Thread(target=_end_with_parent, name="watchdog", daemon=True).start()


def _end_with_parent() -> None:
    """Without this, a daemon that was killed would leave the GPU taken."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def generate(task_id: int, job: Job, model: Model) -> Result:
    """Run one job and return its files, whole and in the output folder. Raises EngineError or Cancelled."""
    return _guarded(task_id, lambda studio, meter: studio.make(task_id, job, model, meter))


def warm(model: Model) -> None:
    """Load `model`, so that the next task of it need not. Raises EngineError."""
    _guarded(NO_TASK, lambda studio, _meter: studio.load(model, model.tasks[0]))


def _guarded(task_id: int, work: "Callable[[Studio, Meter], T]") -> T:
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


def _opened() -> "Studio":
    global _studio
    if _studio is None:
        from engine.gpu.studio import Studio

        _studio = Studio(_config)
    return _studio


def _give_back() -> None:
    _board.loaded = fingerprint(_studio.model_id) if _studio and _studio.model_id else 0
    if _studio is not None:
        _studio.give_back()


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
