"""What a worker or a follower does before it imports torch: logging, environment, the card that it sees."""

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from engine.capabilities import compile_environment, hide_unused_packages
from engine.job import GROUP_SIGNALS, EngineConfig
from engine.log import set_up as set_up_log

VISIBLE = "CUDA_VISIBLE_DEVICES"
QUIET = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}
LOCAL_ONLY = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")  # a team does not listen to the LAN


@dataclass(frozen=True)
class Rank:
    """One of the `count` processes of a team; the lead is number 0. They find each other by the file `rendezvous`."""

    number: int
    count: int
    device: str
    rendezvous: Path


def prepare(config: EngineConfig, device: str, visible: str | None) -> None:
    """Make this process work on `device` of `visible`, the daemon's CUDA_VISIBLE_DEVICES, and end with its parent."""
    set_up_log(config.log_level)
    # A named semaphore, such as tqdm's, would stay behind when this process is killed; of this kind none has a name.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(QUIET, HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    if config.compile:
        os.environ.update(compile_environment(config.state_path))
    hide_unused_packages(config.transformer_quantization)
    if device.startswith("cuda:"):
        os.environ[VISIBLE] = only_card(int(device[5:]), visible)
    if not config.allow_download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if config.team:
        os.environ.update(LOCAL_ONLY)
    threading.Thread(target=_end_with_parent, name="watchdog", daemon=True).start()


def ignore_signals() -> None:
    """Leave the signals that end the daemon to it, also where they reach all processes; it ends this one in order."""
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)  # held while this process was started


def _end_with_parent() -> None:
    """Without this, a daemon that was killed would leave the GPU taken."""
    parent = multiprocessing.parent_process()
    assert parent
    wait([parent.sentinel])
    end_all()


def end_all() -> None:
    """Kill this process with all of its group: a worker, its followers and its ffmpeg."""
    os.killpg(0, signal.SIGKILL)


def only_card(number: int, visible: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES that leaves card `number` of `visible` (None: all), or none without it."""
    # Not every thread and library uses the device that torch was given: each would take memory of the first card.
    if visible is None:
        return str(number)
    cards = visible.split(",")
    return cards[number].strip() if number < len(cards) else ""
