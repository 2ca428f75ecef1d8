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

QUICK_CPU_S, CPU_S = 0.4, 8.0  # for all files of a request; a picture of 50 megapixels takes one or two
CHECK_S = 20.0  # likewise, of waiting
LOOK_S = 0.25  # between two looks whether the client is still there
TOO_LONG = "takes too long to decode; send a shorter or simpler one"
ENDED = "can't be decoded; send it in another format"


class Unusable(Exception):
    """A file can't be used: its place in the list, and a sentence without its subject."""


class Checks:
    """Examines the files of requests within limits of time and memory. Clients take turns at it.

    What takes more than a moment begins again in a lane of its own, so that it keeps nothing small waiting.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._lanes = {Turns(1): QUICK_CPU_S, Turns(1): CPU_S}  # two at a time: each may take hundreds of MiB

    async def seconds(
        self, files: Sequence[tuple[str, Path]], client: str, gone: Callable[[], bool] = lambda: False
    ) -> list[float]:
        """Return the length of each file, given by kind and path; 0 for a picture.

        Raises Unusable for the first that can't be decoded, ConnectionError once the client is `gone`, and NoStorage if
        no process can be started. No process is left when this returns.
        """
        arguments = [str(self._max_pixels), *(text for kind, path in files for text in (kind, str(path)))]
        for turns, cpu_s in self._lanes.items():
            async with turns.turn(client):
                found, code = await _run(str(cpu_s), *arguments, gone=gone)
            if code != -signal.SIGPROF:
                break
        for place, seconds in enumerate(found):
            if isinstance(seconds, str):
                raise Unusable(place, seconds)
        if len(found) < len(files):
            raise Unusable(len(found), TOO_LONG if code in (None, -signal.SIGPROF) else ENDED)
        return found


async def _run(*arguments: str, gone: Callable[[], bool]) -> tuple[list[Any], int | None]:
    """What the process reports until its end, and its exit code; None if it had to be ended."""
    found: list[Any] = []

    async def read() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            found.append(json.loads(line))

    try:
        async with child.running("engine.files.check_media", *arguments, quiet=True) as process:
            reading = asyncio.create_task(read())
            try:
                async with awake.timeout(CHECK_S):
                    while not reading.done():
                        if gone():
                            raise ConnectionResetError("the client has gone")
                        await asyncio.wait({reading}, timeout=LOOK_S)
                    return found, await process.wait()
            except TimeoutError:
                return found, None
            finally:
                reading.cancel()
    except ConnectionError:
        raise
    except OSError as error:
        reason = f"No process can be started to check the files ({error.strerror}); try again later"
        raise NoStorage(reason) from None
