"""The downloads that were asked for: one at a time, beside the queue, each in a process of its own."""

import asyncio
import json
import os
import subprocess
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine.catalog.models import PACKAGE

LONGEST_LINE = 2**20  # bytes of one message of the process


class Stage(StrEnum):
    """Where a download is."""

    WAITING = "waiting"
    DOWNLOADING = "downloading"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Nothing happens any more."""
        return self in (Stage.COMPLETED, Stage.FAILED, Stage.CANCELLED)


class NoDownload(Exception):
    """There is no such download under way."""


@dataclass
class Download:
    """One download; its bytes are those of all files that were missing, and None until the hub has told them."""

    model_id: str
    stage: Stage = Stage.WAITING
    done_bytes: int = 0
    total_bytes: int | None = None
    file: str = ""
    error: Mapping[str, str] | None = None
    started_at: float = field(default_factory=time.time)
    finished_at: float | None = None

    @property
    def percent(self) -> float:
        """How much is here; 100 only when everything is."""
        if self.stage is Stage.COMPLETED:
            return 100.0
        return min(99.9, round(100 * self.done_bytes / self.total_bytes, 1)) if self.total_bytes else 0.0

    def note(self, message: Mapping[str, Any]) -> None:
        """What the process says of itself."""
        self.done_bytes = message.get("done_bytes", self.done_bytes)
        self.total_bytes = message.get("total_bytes", self.total_bytes)
        self.file = message.get("file", self.file)
        self.error = message.get("error", self.error)

    def end(self, stage: Stage) -> None:
        """It is over."""
        self.stage, self.file, self.finished_at = stage, "", time.time()


class Downloads:
    """All downloads since the daemon started, the latest of each model. Not one survives it: a new request goes on."""

    def __init__(self, models_dir: Path, reserve_bytes: int) -> None:
        self._models_dir, self._reserve_bytes = models_dir, reserve_bytes
        self._known: dict[str, Download] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()

    def get(self, model_id: str) -> Download | None:
        """The latest download of this model."""
        return self._known.get(model_id)

    def start(self, model_id: str) -> Download:
        """Begin a download, or wait for those before it; one that is under way is left as it is."""
        known = self._known.get(model_id)
        if known and not known.stage.ended:
            return known
        self._known[model_id] = download = Download(model_id)
        self._running[model_id] = asyncio.create_task(self._run(download))
        return download

    async def cancel(self, model_id: str) -> Download:
        """End a download; what is here stays, for the next one to go on from. Raises NoDownload."""
        download, running = self._known.get(model_id), self._running.get(model_id)
        if download is None or running is None or download.stage.ended:
            raise NoDownload(f"Model '{model_id}' is not being downloaded")
        await _ended(running)
        if not download.stage.ended:  # cancelled before it ran at all
            download.end(Stage.CANCELLED)
        return download

    async def close(self) -> None:
        """End all downloads."""
        for running in list(self._running.values()):
            await _ended(running)

    async def _run(self, download: Download) -> None:
        try:
            async with self._turn:
                download.stage = Stage.DOWNLOADING
                code = await self._follow(download)
            if code and download.error is None:
                download.error = died(code)
            download.end(Stage.FAILED if code else Stage.COMPLETED)
        except asyncio.CancelledError:
            download.end(Stage.CANCELLED)
            raise
        except (OSError, ValueError) as error:  # no process could be started, or it wrote something else than JSON
            download.error = {"code": "process_died", "message": f"The download could not be run: {error}"}
            download.end(Stage.FAILED)

    async def _follow(self, download: Download) -> int:
        """Run the process to its end, or to the end of this; returns its exit code."""
        process = await asyncio.create_subprocess_exec(
            *command(download.model_id, self._models_dir, self._reserve_bytes),
            stdin=PIPE,  # its end is how the process knows that the daemon is gone
            stdout=PIPE,
            env=environment(),
            limit=LONGEST_LINE,
            start_new_session=True,  # Ctrl-C is the daemon's to handle
        )
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                download.note(json.loads(line))
            return await process.wait()
        finally:
            await _end(process)


def command(model_id: str, models_dir: Path, reserve_bytes: int) -> tuple[str, ...]:
    """The command line of the process that downloads. (-P: no module of the working directory in place of ours.)"""
    return (sys.executable, "-P", "-m", "engine.catalog.fetch", str(models_dir), model_id, str(reserve_bytes))


def messages(model_id: str, models_dir: Path, reserve_bytes: int) -> Iterator[dict[str, Any]]:
    """What that process says, run without an event loop; the last message of a failure has `error`.

    The process ends when nobody listens any more.
    """
    words = command(model_id, models_dir, reserve_bytes)
    with subprocess.Popen(words, stdin=PIPE, stdout=PIPE, env=environment(), start_new_session=True) as process:
        assert process.stdout is not None
        told = False
        for message in map(json.loads, process.stdout):
            told |= "error" in message
            yield message
    if process.returncode and not told:
        yield {"error": died(process.returncode)}


def died(code: int) -> dict[str, str]:
    """The error of a process that said nothing before it ended."""
    return {
        "code": "process_died",
        "message": f"The process that downloads ended with code {code}; ask again, it goes on where it stopped",
    }


def environment() -> dict[str, str]:
    """The environment of that process, in which it finds this package and shows no progress bars."""
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


async def _ended(running: asyncio.Task[None]) -> None:
    running.cancel()
    await asyncio.wait([running])
