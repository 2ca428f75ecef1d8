"""Reading a folder that others change meanwhile."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def stats(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Name and stat of each regular file, no links, of a folder that may not be there. Raises OSError."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as items:
        for item in items:
            with suppress(OSError):  # it has vanished, or can't be looked at
                if item.is_file(follow_symlinks=False):
                    yield item.name, item.stat(follow_symlinks=False)
