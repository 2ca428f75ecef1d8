"""Reading a folder that others change meanwhile, and keeping it within a size."""

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


def trim(folder: Path, limit_bytes: int, goal_bytes: int) -> int:
    """Remove the oldest files of a folder above `limit_bytes` until `goal_bytes` are left; returns the bytes left."""
    files = sorted(stats(folder), key=lambda file: file[1].st_mtime_ns)
    left_bytes = sum(about.st_size for _, about in files)
    if left_bytes > limit_bytes:
        for name, about in files:
            if left_bytes <= goal_bytes:
                break
            (folder / name).unlink(missing_ok=True)
            left_bytes -= about.st_size
    return left_bytes
