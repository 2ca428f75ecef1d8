"""Reading a folder that others change meanwhile."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def scan(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """The regular files of a folder, no symbolic links; none at all where there is no folder."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as items:
        yield from (item for item in items if item.is_file(follow_symlinks=False))


def stats(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Name and stat of each regular file of a folder; one that vanishes meanwhile is left out."""
    for item in scan(folder):
        with suppress(FileNotFoundError):
            yield item.name, item.stat(follow_symlinks=False)
