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
ABSENT = (errno.ENOENT, errno.ENOTDIR)


class FolderLock:
    """A lock on a file in a folder. The kernel releases it, however the process ends."""

    def __init__(self, key: str, file: Path, holder: str) -> None:
        """`key` names the folder in the configuration; `holder` is written into the file, for people to read."""
        self._key, self._file, self._holder = key, file, holder
        self._handle: int | None = None
        self._warned = False

    def take(self) -> str:
        """Hold the lock; "" or a sentence that names who has it. Costs one stat while it is held.

        It is taken again where another folder is at this path now. A file system that can't lock is used without.
        """
        with suppress(OSError):  # the file is gone, and with it the lock
            if self._handle is not None and os.path.samestat(os.fstat(self._handle), self._file.stat()):
                return ""
        try:
            return self._taken()
        except OSError as error:
            if error.errno not in ABSENT and not self._warned:
                self._warned = True
                reason = f"{self._key}: {self._file.parent} can't be locked ({error.strerror})"
                log.warning("%s; no other wangpd may use it", reason)
            return ""

    def _taken(self) -> str:
        """As `take`. Raises OSError where nothing can be locked. A link in the place of the file is not followed."""
        # Not open for writing, which would keep its disk from being remounted read-only.
        handle = os.open(self._file, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            self._lock(handle)
            self._handle, handle = handle, self._handle or -1
            with suppress(OSError):  # the disk may be full, or the file another user's
                os.fchmod(self._handle, 0o644)  # another user's daemon must be able to look
                self._file.write_text(f"{self._holder}\n")
            return ""
        except BlockingIOError:
            other = os.read(handle, 1000).decode(errors="replace").strip() or "unknown"
            return f"{self._key}: {self._file.parent} is in use by another wangpd ({other}); one folder, one daemon"
        finally:
            if handle >= 0:
                os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            writable = os.open(self._file, os.O_RDWR | os.O_NOFOLLOW)  # NFS locks nothing else
            os.dup2(writable, handle, inheritable=False)
            os.close(writable)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
