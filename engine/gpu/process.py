"""What a process of the engine does before anything else, torch included: logging, environment, the card that it sees.

A worker is started by the daemon, and its followers (see engine.gpu.team) by the worker.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from engine.capabilities import compile_environment, hide_unused_packages
from engine.job import EngineConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOCAL_ONLY = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")  # a team does not listen to the LAN


@dataclass(frozen=True)
class Rank:
    """The place of one process in a team of `count`; the lead is rank 0. They meet by the file `rendezvous`."""

    number: int
    count: int
    device: str
    rendezvous: Path


def prepare(config: EngineConfig, device: str) -> None:
    """Make this process one that works on `device`, as configured, and that ends with the one that started it."""
    logging.basicConfig(stream=sys.stderr, level=config.log_level.upper(), format="%(name)s: %(message)s")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false", DIFFUSERS_VERBOSITY="error")
    if config.compile:
        os.environ.update(compile_environment(config.state_path))
    hide_unused_packages(config.transformer_quantization)
    if device.startswith("cuda:"):
        os.environ[VISIBLE] = only_card(int(device[5:]), os.environ.get(VISIBLE))
    if not config.allow_download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if config.team:
        os.environ.update(LOCAL_ONLY)
    threading.Thread(target=_end_with_parent, name="watchdog", daemon=True).start()


def follow(connection: Connection, rank: Rank, config: EngineConfig, visible: str | None) -> None:
    """The whole life of a follower; `visible` are the cards that the lead could see before it chose its own."""
    os.environ.pop(VISIBLE, None)
    if visible is not None:
        os.environ[VISIBLE] = visible
    prepare(config, rank.device)
    from engine.gpu.team.follower import Follower  # not before: it imports torch

    Follower(connection, rank, config).serve()


def _end_with_parent() -> None:
    """Without this, a daemon that was killed would leave the GPU taken."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    end_all()


def end_all() -> None:
    """Kill this process with all of its group: a worker, its followers and its ffmpeg."""
    os.killpg(0, signal.SIGKILL)


def only_card(number: int, visible: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES that leaves card `number` of `visible` (None: all), or none if it has none.

    A worker that saw the others too would take some hundred MB of the first one for a CUDA context: not every thread
    and library uses the device that torch is set to.
    """
    cards = visible.split(",") if visible is not None else None
    if cards is None:
        return str(number)
    return cards[number].strip() if number < len(cards) else ""
