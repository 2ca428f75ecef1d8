"""Python processes of our own beside the daemon, for work that must be able to be ended."""

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent  # which `engine` is imported from


@asynccontextmanager
async def running(
    module: str, *arguments: str, quiet: bool = False, environment: Mapping[str, str] = {}
) -> AsyncIterator[Process]:
    """Run `python -m module`, whose standard output can be read; after the block it is killed. Raises OSError.

    Its standard input is closed when the daemon ends in any way.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, *arguments),  # -P: no module of the working directory in place of ours
        stdin=PIPE,
        stdout=PIPE,
        stderr=DEVNULL if quiet else None,
        env={**os.environ, "PYTHONPATH": path, **environment},
        limit=2**20,  # bytes of a line
        start_new_session=True,  # Ctrl-C is the daemon's to handle
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # it has ended
            process.kill()
        await process.wait()
