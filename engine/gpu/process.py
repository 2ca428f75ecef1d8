"""What a worker or a follower does before it imports torch: logging, environment, the card that it sees."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from engine.capabilities import compile_environment, hide_unused_packages
from engine.job import GROUP_SIGNALS, EngineConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
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
    logging.basicConfig(stream=sys.stderr, level=config.log_level.upper(), format="%(name)s: %(message)s")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false", DIFFUSERS_VERBOSITY="error")
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


def release_signals() -> None:
    """Take signals, which are held while this process is started; those that came to the daemon's group are dropped."""
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)


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
    """The value of CUDA_VISIBLE_DEVICES that leaves card `number` of `visible` (None: all), or none if there is none.

    A worker that saw the others too would take some hundred MB of the first one for a CUDA context: not every thread
    and library uses the device that torch was given.
    """
    if visible is None:
        return str(number)
    cards = visible.split(",")
    return cards[number].strip() if number < len(cards) else ""
