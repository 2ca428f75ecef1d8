"""Reading a folder that others change meanwhile."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def stats(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Name and stat of each regular file of a folder that may not be there; no symbolic links.

    A file that has vanished, or that can't be looked at, is left out. Raises OSError if the folder can't be read.
    """
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as items:
        for item in items:
            with suppress(OSError):
                if item.is_file(follow_symlinks=False):
                    yield item.name, item.stat(follow_symlinks=False)
