"""Whose a folder is: the lock that one daemon has on it, and the id in the names of the files that it makes there."""

import errno
import fcntl
import logging
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from engine.files.publish import published

log = logging.getLogger("wangpd")


class FolderLock:
    """A lock on a file in a folder. The kernel releases it, however the process ends."""

    def __init__(self, key: str, file: Path, holder: str) -> None:
        """`key` names the folder in the configuration; `holder` is written into the file, for people to read."""
        self._key, self._file, self._holder = key, file, holder
        self._handle = -1
        self._warned = False

    def take(self) -> str:
        """Hold the lock; "" or a sentence that names who has it. Costs one stat while it is held.

        It is taken again where another folder is at this path now. A file system that can't lock is used without.
        """
        try:
            if self._handle >= 0 and os.path.samestat(os.fstat(self._handle), self._file.stat()):
                return ""
        except OSError:
            pass  # the file is gone, and with it the lock
        try:
            return self._taken()
        except OSError as error:
            absent = error.errno in (errno.ENOENT, errno.ENOTDIR)
            if not absent and not self._warned:
                self._warned = True
                log.warning("%s: %s can't be locked (%s); no other wangpd may use it", *self._named(), error.strerror)
            return ""

    def _taken(self) -> str:
        """As `take`. Raises OSError where nothing can be locked."""
        handle = self._opened()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(handle, 1000).decode(errors="replace").strip()
            os.close(handle)
            key, folder = self._named()
            return f"{key}: {folder} is in use by another wangpd ({other or 'unknown'}); one folder, one daemon"
        except OSError:
            os.close(handle)
            raise
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = handle
        with suppress(OSError):  # the disk may be full
            os.ftruncate(handle, 0)
            os.write(handle, f"{self._holder}\n".encode())
        return ""

    def _opened(self) -> int:
        """A handle of the file, for reading only if it is another user's. A link in its place is not followed."""
        flags = os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self._file, os.O_RDWR | os.O_CREAT | flags, 0o644)
        except PermissionError:
            return os.open(self._file, os.O_RDONLY | flags)

    def _named(self) -> tuple[str, Path]:
        return self._key, self._file.parent


def instance_id(state_path: Path) -> str:
    """The id of the daemon with this state folder, which must be locked: 6 hex digits. Raises OSError."""
    file = state_path / "instance"
    with suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{6}", known := file.read_text("ascii").strip()):
            return known
    new = secrets.token_hex(3)
    with published(file) as part:
        part.write_text(new + "\n")
    return new
