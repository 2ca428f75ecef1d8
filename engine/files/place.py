"""The folders that the daemon writes to: whether each can take a file now, and if not, why."""

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile

from engine import awake
from engine.files.publish import move

log = logging.getLogger("wangpd.queue")
PATIENCE_S = 2.0  # a network share whose server is gone blocks whoever looks at it
HOLD_S = 10.0  # how long a fault counts that only a write has shown
PROBE_BYTES = 2**20


class NoStorage(Exception):
    """A file can't be stored now: one sentence."""


class Folder:
    """A folder that is named by a configuration key. Its methods block."""

    def __init__(self, path: Path, key: str, least_bytes: int, rule: str, *, mounted: bool = False) -> None:
        """`least_bytes` must be free on its disk; `rule` says so, and how a person makes room.

        `mounted`: it is known to have been a mount point.
        """
        self._path, self._key, self._least_bytes, self._rule = path, key, least_bytes, rule
        self._mounted = mounted  # it has been a mount point
        self.suspect = False  # a write has failed: the next look writes too, for a quota shows in no other way

    def fault(self) -> str:
        """Why nothing can be stored here now, a sentence; "" if it can."""
        suspect = self.suspect  # now: it may become so while this looks
        try:
            if away := self.away():
                return away
            free_bytes = shutil.disk_usage(self._path).free
            with os.scandir(self._path):
                pass
            if suspect:
                with TemporaryFile(dir=self._path) as file:
                    file.write(bytes(PROBE_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            return f"{self._key} can't be used now ({error.strerror}); bring the folder back"
        if not os.access(self._path, os.W_OK | os.X_OK):
            return f"{self._key} can't be written to now; make the folder writable for the user of wangpd"
        if free_bytes < self._least_bytes:
            return f"The disk of {self._key} has {free_bytes // 2**20} MiB free and {self._rule}"
        if suspect:
            self.suspect = False
        return ""

    def away(self) -> str:
        """A sentence where only an empty mount point is left of the folder, else "": a file in it would be hidden."""
        try:
            mounted = self._path.is_mount()
        except OSError:  # who goes on to use the folder says what is wrong with it
            return ""
        if self._mounted and not mounted and os.path.isdir(self._path):  # noqa: PTH112 - raises nothing
            return f"{self._key}: its disk is not mounted any more; mount it again, or restart wangpd"
        self._mounted |= mounted
        return ""

    def take(self, whole: Path) -> str:
        """Give a whole file its place in the folder, or return why that can't be done now; it is where it was then."""
        final = self._path / whole.name
        try:
            if away := self.away():
                return away
            move(whole, final)
            if (away := self.away()) and final.exists():  # unmounted in between
                move(final, whole)
        except OSError as error:
            return f"'{whole.name}' can't be saved in {self._key} now ({error.strerror}); it is kept until it can"
        return away


class Place:
    """All that must be well for results to be stored. Used on the event loop only."""

    def __init__(self, folders: Sequence[Folder], lock: Callable[[], str] = str) -> None:
        """`lock` holds the lock of the output folder, of another one too that is there now: "" or who has it."""
        self._folders, self._lock = folders, lock
        self._held, self._held_until = "", 0.0
        self._thread = ThreadPoolExecutor(1, "place")  # a disk that hangs takes no other thread with it
        self._looking: asyncio.Future[str] | None = None
        self.fault = ""  # what the last look has found

    async def look(self) -> str:
        """Look now, and return why nothing can be stored, a sentence; "" if all is well."""
        self._show(self._held if time.monotonic() < self._held_until else await self._patient_look())
        return self.fault

    def _show(self, fault: str) -> None:
        if fault and not self.fault:
            log.error("no task is started now: %s", fault)
        elif self.fault and not fault:
            log.info("all folders are well again, and tasks are started")
        self.fault = fault

    async def _patient_look(self) -> str:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().run_in_executor(self._thread, self._first_fault)
        try:
            async with awake.timeout(PATIENCE_S):
                return await asyncio.shield(self._looking)
        except TimeoutError:
            return "The disk of save_path or state_path does not answer; see whether its server is up"

    def _first_fault(self) -> str:
        return next(filter(None, (folder.fault() for folder in self._folders)), "") or self._lock()

    async def doubt(self) -> str:
        """Look with a trial write, since one has failed."""
        for folder in self._folders:
            folder.suspect = True
        self._looking = None  # a look that is under way may be past the place where it would write
        return await self.look()

    def hold(self, sentence: str) -> None:
        """Let a fault that a look may not show be the answer for a while; "" ends that."""
        self._held, self._held_until = sentence, time.monotonic() + (HOLD_S if sentence else 0.0)
        if sentence:
            self._show(sentence)
