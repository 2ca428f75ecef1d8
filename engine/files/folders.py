"""Reading a folder that others change meanwhile."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def stats(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Name and stat of each regular file of a folder that may not be there; no symbolic links, none that vanishes."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as items:
        for item in items:
            if item.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    yield item.name, item.stat(follow_symlinks=False)
