"""The daemon's end of the pipe on which a worker reports what its board can't hold: a line of JSON each.

The pipe has one end in each process and no lock, so that a worker may be killed at any moment: what it has not sent
whole is dropped, and the end of the pipe is the end of the worker.
"""

import asyncio
import json
import os
from contextlib import suppress
from multiprocessing.connection import Connection

from engine.job import EngineError, OutputFile
from engine.planning.machine import Machine

CHUNK_BYTES = 2**16  # as much as a pipe holds


class Reports:
    """The newest of each kind, read from the pipe as they come. Used on the event loop only."""

    def __init__(self, pipe: Connection, made: dict[int, list[OutputFile]]) -> None:
        """`made` gets each whole file, under the id of its task."""
        self._made = made
        self.plan = ""  # where the weights of its model are, in a line
        self.machine: Machine | None = None  # what it measured, before it loaded a model
        self.ended = False  # the worker is gone, and there will be no more
        self._settled: dict[int, EngineError | None] = {}  # number of a job whose files are written, or given up → why
        self._pipe, self._rest = pipe, b""
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        os.set_blocking(pipe.fileno(), False)
        self._loop.add_reader(pipe.fileno(), self.read)

    def read(self) -> None:
        """Take in whatever has arrived; waits for nothing."""
        with suppress(BlockingIOError):
            while not self.ended:
                self._take(os.read(self._pipe.fileno(), CHUNK_BYTES))
        self._news.set()
        self._news.clear()

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for report in map(json.loads, lines):
            self.plan = report.get("plan", self.plan)
            self.machine = Machine(**report["machine"]) if "machine" in report else self.machine
            if "made" in report:
                self._made.setdefault(report["task"], []).append(OutputFile(**report["made"]))
            if "settled" in report:
                fault = EngineError(report["fault"], report["code"]) if report["fault"] else None
                self._settled[report["settled"]] = fault
        if not data:
            self.close()

    async def settled(self, number: int) -> None:
        """Wait until a job's files are written. Raises EngineError if they can't be, EOFError if the worker dies."""
        while number not in self._settled and not self.ended:
            await self._news.wait()
        if number not in self._settled:
            raise EOFError
        if fault := self._settled.pop(number):
            raise fault

    def close(self) -> None:
        """Read no more."""
        if not self.ended:
            self.ended = True
            self._loop.remove_reader(self._pipe.fileno())
            self._pipe.close()
            self._news.set()
            self._news.clear()
