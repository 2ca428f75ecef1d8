"""Whether files from clients can be decoded, found out in processes that can be ended."""

import asyncio
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine import awake, child
from engine.files.place import NoStorage
from engine.turns import Turns

CHECK_S = 20.0  # for all files of a request
LOOK_S = 0.25  # between two looks whether the client is still there
TOO_LONG = "takes too long to decode; send a shorter or simpler one"
ENDED = "can't be decoded; send it in another format"


class Unusable(Exception):
    """A file can't be used: its place in the list, and a sentence without its subject."""


class Checks:
    """Examines the files of requests within limits of time and memory. Clients take turns at it."""

    def __init__(self, turns: Turns, max_pixels: int) -> None:
        self._turns, self._max_pixels = turns, max_pixels

    async def seconds(
        self, files: Sequence[tuple[str, Path]], client: str, gone: Callable[[], bool] = lambda: False
    ) -> list[float]:
        """Return the length of each file, given by kind and path; 0 for a picture.

        Raises Unusable for the first that can't be decoded, ConnectionError once the client is `gone`, and NoStorage if
        no process can be started. No process is left when this returns.
        """
        arguments = [str(self._max_pixels), *(text for kind, path in files for text in (kind, str(path)))]
        async with self._turns.turn(client):
            try:
                async with child.running("engine.files.check_media", *arguments, quiet=True) as process:
                    found, fault = await _reports(process, gone)
            except OSError as error:
                if isinstance(error, ConnectionError):
                    raise
                reason = f"No process can be started to check the files ({error.strerror}); try again later"
                raise NoStorage(reason) from None
        for place, seconds in enumerate(found):
            if isinstance(seconds, str):
                raise Unusable(place, seconds)
        if len(found) < len(files):
            raise Unusable(len(found), fault)
        return found


async def _reports(process: asyncio.subprocess.Process, gone: Callable[[], bool]) -> tuple[list[Any], str]:
    """What the process has reported until its end, and what is wrong with the file behind those, if there is one."""
    found: list[Any] = []

    async def read() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            found.append(json.loads(line))

    reading = asyncio.create_task(read())
    try:
        async with awake.timeout(CHECK_S):
            while not reading.done():
                if gone():
                    raise ConnectionResetError("the client has gone")
                await asyncio.wait({reading}, timeout=LOOK_S)
            code = await process.wait()
    except TimeoutError:
        return found, TOO_LONG
    finally:
        reading.cancel()
    return found, TOO_LONG if code == -signal.SIGXCPU else ENDED
