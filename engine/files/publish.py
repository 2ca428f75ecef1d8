"""Gives a file its final name once it is whole."""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

KEPT: Final = "unsaved"  # in state_path: what is whole, or being written, and not yet in the output folder


@contextmanager
def published(final: Path, *, rivals: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield the hidden path beside `final` to write to; after the block it is renamed, or removed if the block raises.

    `rivals`: others may write the same file now. `durable`: bytes and name are on the disk then. Raises OSError.
    """
    part = final.with_name(f".{final.name}{f'.{threading.get_native_id()}' if rivals else ''}.part")
    try:
        yield part
        if durable:
            _sync(part)
        part.replace(final)
        if durable:
            _sync(final.parent)
    finally:
        with suppress(OSError):  # gone by rename; or the disk is worse off than one leftover
            part.unlink(missing_ok=True)


def move(whole: Path, final: Path) -> None:
    """Give a whole file another place, on another disk too. Raises OSError, and then `whole` is still there."""
    try:
        _sync(whole)
        whole.replace(final)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with published(final, rivals=True) as part:  # the daemon and its worker may both be at it
            shutil.copy2(whole, part)
        whole.unlink(missing_ok=True)
    else:
        _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
