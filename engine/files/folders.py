"""Reading a folder that others change meanwhile."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path, flags: int = os.O_NOFOLLOW) -> BufferedReader:
    """Open a regular file for reading, whose `name` is `path`. Raises OSError, also for a link, a device or a FIFO.

    Nothing that lies there can make it wait. With no `flags` it follows links.
    """
    file = open(path, "rb", opener=lambda name, mode: os.open(name, mode | os.O_NONBLOCK | flags))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.ENXIO, "Not a regular file")


def stats(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Name and stat of each regular file, no links, of a folder that may not be there. Raises OSError."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as items:
        for item in items:
            with suppress(OSError):  # it has vanished, or can't be looked at
                if item.is_file(follow_symlinks=False):
                    yield item.name, item.stat(follow_symlinks=False)
