"""Downloads of models: one at a time, independent of the task queue, each in a process of its own."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine import child
from engine.quiet import without_paths

Message = dict[str, Any]  # fields of Download that the process reports: `error`, or bytes and `file`
# The states of a download; each is its own name in lower case.
Stage = StrEnum("Stage", ["WAITING", "DOWNLOADING", "COMPLETED", "FAILED", "CANCELLED"])


class NoDownload(Exception):
    """This model is not being downloaded."""


@dataclass
class Download:
    """One download. Its bytes are those of all files that were missing; the total is None until the hub lists them."""

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
        """100 only when everything is here."""
        if self.stage is Stage.COMPLETED:
            return 100.0
        return min(99.9, round(100 * self.done_bytes / self.total_bytes, 1)) if self.total_bytes else 0.0

    def end(self, stage: Stage) -> None:
        """Set the final stage."""
        self.stage, self.file, self.finished_at = stage, "", max(time.time(), self.started_at)


class Downloads:
    """The latest download of each model since the daemon started. None survives the daemon; a new request resumes."""

    def __init__(self, models_dir: Path, reserve_bytes: int) -> None:
        self._models_dir, self._reserve_bytes = models_dir, reserve_bytes
        self.latest: dict[str, Download] = {}  # by model
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()

    def start(self, model_id: str) -> Download:
        """Start a download, or queue it behind those before it; returns the one that is under way if there is one."""
        if model_id not in self._tasks or self._tasks[model_id].done():
            self.latest[model_id] = Download(model_id)
            self._tasks[model_id] = asyncio.create_task(self._run(self.latest[model_id]))
        return self.latest[model_id]

    async def cancel(self, model_id: str) -> Download:
        """End a download and return it; what is here stays, for the next one to resume from. Raises NoDownload."""
        task = self._tasks.get(model_id)
        if task is None or task.done():
            raise NoDownload(f"Model '{model_id}' is not being downloaded")
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            self.latest[model_id].end(Stage.CANCELLED)
        return self.latest[model_id]

    async def close(self) -> None:
        """End all downloads."""
        for model_id in list(self.latest):
            with suppress(NoDownload):
                await self.cancel(model_id)

    async def _run(self, download: Download) -> None:
        async with self._turn:
            download.stage = Stage.DOWNLOADING
            async for message in messages(download.model_id, self._models_dir, self._reserve_bytes):
                vars(download).update(message)
            if fault := download.error:
                download.error = {**fault, "message": without_paths(fault["message"], {"models_dir": self._models_dir})}
            download.end(Stage.FAILED if download.error else Stage.COMPLETED)


async def messages(model_id: str, models_dir: Path, reserve_bytes: int) -> AsyncIterator[Message]:
    """Download in a process and yield what it reports; if it fails, the last message has `error`. A cancel kills it."""
    message: Message = {}
    try:
        arguments = (str(models_dir), model_id, str(reserve_bytes))
        silent = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        async with child.running("engine.catalog.fetch", *arguments, environment=silent) as process:
            assert process.stdout is not None
            async for line in process.stdout:
                message = json.loads(line)
                yield message
            fault = f"ended with code {code}" if (code := await process.wait()) else ""
    except (OSError, ValueError) as error:  # it could not be started, or wrote something other than JSON
        fault = f"failed: {error}"
    if fault and "error" not in message:
        sentence = f"The download process {fault}; try again: the download resumes where it stopped"
        yield {"error": {"code": "process_died", "message": sentence}}
