"""The output folder. It is the only source of truth: users may add, overwrite and delete files too."""

import errno
import math
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple

from engine.files import media
from engine.files.folders import stats
from engine.files.thumbnails import ThumbnailCache, key_of
from engine.job import EngineError

# A change within one tick of the file system's clock leaves the time stamp unchanged: 10 ms on Linux file systems,
# 1 or 2 s on FAT and some network shares. What was touched this recently may still change.
_UNSETTLED_S: Final = 2.0
# Overwriting a file in place does not change its folder's time stamp, so a snapshot expires after this long.
_MAX_AGE_S: Final = 30.0

# A leading dot (`..`, hidden files, unpublished parts), separators of any system, control characters, and the lone
# surrogates that stand for bytes that are not UTF-8 and can't be sent as JSON.
_UNSAFE_NAME: Final = re.compile(r"^\.|[\x00-\x1f\x7f-\x9f/\\\ud800-\udfff]")


class Entry(NamedTuple):
    """A media file of the output folder."""

    filename: str
    type: str  # video, image, audio
    size_bytes: int
    created_at: float  # epoch seconds; the earlier of mtime and ctime, as `stat` has no time of birth on Linux
    modified_at: float  # epoch seconds


class Retention(NamedTuple):
    """How much room the folder may take and must leave; 0 means no limit."""

    keep_s: float = 0
    keep_bytes: int = 0
    min_free_bytes: int = 0


class _Snapshot(NamedTuple):
    """One reading of the folder."""

    folder_times: tuple[int, int] | None  # None: never read
    read_at: float  # time.monotonic() before the reading
    settled: bool  # nothing was touched so recently that its time stamp could hide a change
    by_type: Mapping[str | None, Sequence[Entry]]  # None: of every type


class Outputs:
    """The output folder. Every method may be called from any thread, and all of them block: use `asyncio.to_thread`."""

    def __init__(self, folder: Path, cache: Path, retention: Retention | None = None) -> None:
        self._folder = folder
        self._retention = retention or Retention()
        self._thumbnails = ThumbnailCache(cache)
        self._snapshot = _Snapshot(None, -math.inf, False, {})
        self._reading = threading.Lock()

    def fresh(self) -> bool:
        """Whether `listing` would answer from memory. Costs one stat, so that the event loop may ask."""
        known = self._snapshot
        valid = known.settled and time.monotonic() - known.read_at <= _MAX_AGE_S
        with suppress(OSError):
            return valid and known.folder_times == _times(self._folder)
        return False

    def listing(self, file_type: str | None = None) -> Sequence[Entry]:
        """Return the media files, all or of one type, newest modification first, ties by name.

        Raises OSError if the folder is not there or can't be read.
        """
        if not self.fresh():
            asked_at = time.monotonic()
            with self._reading:
                if self._snapshot.read_at < asked_at:  # else another thread has read it meanwhile
                    self._snapshot = _read(self._folder)
        return self._snapshot.by_type.get(file_type, ())

    def find(self, filename: str) -> Path | None:
        """Return the regular file of that name in the folder, else None: for links, devices, what `listing` hides.

        Raises OSError if the folder is not there or can't be searched.
        """
        path = self._folder / filename
        try:
            return path if _kind(filename) and stat.S_ISREG(path.lstat().st_mode) else None
        except ValueError:  # a name that the file system can't express
            return None
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
                raise
            _times(self._folder)
            return None

    def thumbnail(self, path: Path, width: int) -> Path | bytes:
        """Return the cached file of `media.thumbnail`, or its bytes if none can be written. Raises what that raises."""
        path.open("rb").close()  # what can't be read is not shown either, though its thumbnail may be here
        key = key_of(path, width)
        if kept := self._thumbnails.get(key):
            return kept
        jpeg = media.thumbnail(path, width)
        return self._thumbnails.put(key, jpeg) or jpeg

    def remove_attempt(self, task_id: int) -> int:
        """Delete the files of a broken attempt at a task, published or partial; returns how many. Raises OSError."""
        return self._remove(rf"\.?\d{{8}}-\d{{6}}_t{task_id:06d}_.+")

    def remove_parts(self, task_id: int | None = None) -> int:
        """Delete the partial files of a task, or while no worker runs of all; returns how many. Raises OSError."""
        number = r"\d{6,}" if task_id is None else f"{task_id:06d}"
        return self._remove(rf"\.\d{{8}}-\d{{6}}_t{number}_.+\.part")

    def _remove(self, pattern: str) -> int:
        """Names that the worker gives begin with a time, so that a user's own "trip_t000123_.mp4" stays."""
        left = [name for name, _ in stats(self._folder) if re.fullmatch(pattern, name)]
        for name in left:
            (self._folder / name).unlink(missing_ok=True)
        return len(left)

    def prepare(self) -> None:
        """Remove the oldest files beyond what is to be kept. Raises EngineError if a task still has no room."""
        keep_s, keep_bytes = self._retention.keep_s, self._retention.keep_bytes
        entries: Sequence[Entry] = ()
        if keep_s or keep_bytes:
            with suppress(OSError):  # `no_room` reports it
                entries = self.listing()
        total_bytes, now = sum(entry.size_bytes for entry in entries), time.time()
        for entry in reversed(entries):
            too_old = keep_s and now - entry.modified_at > keep_s
            if not too_old and not (keep_bytes and total_bytes > keep_bytes):
                break
            (self._folder / entry.filename).unlink(missing_ok=True)
            total_bytes -= entry.size_bytes
        if sentence := self.no_room():
            raise EngineError(sentence, "disk_full")

    def no_room(self) -> str | None:
        """A sentence if the disk is too full for a task, else None. One statvfs: the event loop may ask."""
        least_bytes = self._retention.min_free_bytes
        try:
            free_bytes = shutil.disk_usage(self._folder).free
        except OSError as error:
            return f"save_path can't be used now ({error.strerror}); bring the folder back"
        if free_bytes >= least_bytes:
            return None
        free_mb, least_mb = free_bytes // 2**20, least_bytes // 2**20
        return f"The disk of save_path has {free_mb} MiB free and min_free_mb asks for {least_mb}: delete old outputs"

    def highest_task_id(self) -> int:
        """Return the largest task id in a name that the worker gave, or 0: needed when the journal is lost."""
        found = (re.match(r"\.?\d{8}-\d{6}_t(\d{6,18})_", name) for name, _ in stats(self._folder))
        return max((int(match[1]) for match in found if match), default=0)


def _kind(name: str) -> str:
    """The kind of a media file; "" if it is none, or its name is unsafe."""
    _, dot, suffix = name.rpartition(".")  # pathlib would take most of the time of a large folder's listing
    kind, _ = media.MEDIA_TYPES.get(dot + suffix.lower(), ("", ""))
    return "" if _UNSAFE_NAME.search(name) else kind


def _times(folder: Path) -> tuple[int, int]:
    """When the folder's content and its permissions changed, in ns. Raises OSError if it can't be searched."""
    about = os.stat(f"{folder}/.")  # noqa: PTH116  pathlib drops the dot, which makes the kernel ask for that permission
    return about.st_mtime_ns, about.st_ctime_ns


def _read(folder: Path) -> _Snapshot:
    read_at, now = time.monotonic(), time.time()
    times = _times(folder)  # before the files: a change during the reading then shows as one afterwards
    entries = [
        Entry(name, kind, about.st_size, min(about.st_mtime, about.st_ctime), about.st_mtime)
        for name, about in stats(folder)
        if (kind := _kind(name))
    ]
    # Two plain sorts, the second one stable: half the time of one by a pair, and a sort lets no other thread run.
    entries.sort(key=attrgetter("filename"))
    entries.sort(key=attrgetter("modified_at"), reverse=True)
    touched = [times[0] / 1e9, *(entry.modified_at for entry in entries)]
    settled = all(abs(now - touched_at) > _UNSETTLED_S for touched_at in touched)
    kinds: set[str | None] = {kind for kind, _ in media.MEDIA_TYPES.values()}
    by_type = {kind: tuple(entry for entry in entries if entry.type == kind) for kind in kinds}
    return _Snapshot(times, read_at, settled, {None: tuple(entries), **by_type})
