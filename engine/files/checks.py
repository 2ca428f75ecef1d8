"""Whether files from clients can be decoded, found out in processes that can be ended."""

import asyncio
import json
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine import awake, child
from engine.files.place import NoStorage
from engine.turns import Turns

QUICK_CPU_S, CPU_S = 0.2, 8.0  # for all files of a request; a picture of 50 megapixels takes one or two
CHECK_S = 20.0  # likewise, of waiting
TOO_LONG = "takes too long to decode; send a shorter or simpler one"
ENDED = "can't be decoded; send it in another format"


class Unusable(Exception):
    """A file can't be used: its place in the list, and a sentence without its subject."""


class Checks:
    """Examines the files of requests within limits of time and memory. Clients take turns at it.

    What takes more than a moment begins again in a lane of its own, so that nothing small waits for it.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._lanes = {Turns(1): QUICK_CPU_S, Turns(1): CPU_S}  # two at a time: each may take hundreds of MiB

    async def seconds(self, files: Sequence[tuple[str, Path]], client: str) -> list[float]:
        """Return the length of each file, given by kind and path; 0 for a picture.

        Raises Unusable for the first that can't be decoded, and NoStorage if no process can be started. None is left
        when this returns or is cancelled.
        """
        arguments = [str(self._max_pixels), *(text for kind, path in files for text in (kind, str(path)))]
        for turns, cpu_s in self._lanes.items():
            found: list[Any] = []
            async with turns.turn(client):
                try:
                    async with child.running("engine.files.check_media", str(cpu_s), *arguments, quiet=True) as process:
                        code = await _reports(process, found)
                except OSError as error:
                    reason = f"No process can be started to check the files ({error.strerror}); try again later"
                    raise NoStorage(reason) from None
            if code != -signal.SIGPROF:
                break
        if found and isinstance(found[-1], str):
            raise Unusable(len(found) - 1, found[-1])
        if len(found) < len(files):
            raise Unusable(len(found), TOO_LONG if code in (None, -signal.SIGPROF) else ENDED)
        return found


async def _reports(process: asyncio.subprocess.Process, found: list[Any]) -> int | None:
    """Add what the process reports to `found`; return its exit code, None if it has none in time."""
    assert process.stdout is not None
    with suppress(TimeoutError):
        async with awake.timeout(CHECK_S):
            async for line in process.stdout:
                found.append(json.loads(line))
            return await process.wait()
    return None
