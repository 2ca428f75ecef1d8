"""The output folder. It is the only source of truth: users may add, overwrite and delete files too."""

import math
import re
import stat
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple

from engine.files import media
from engine.files.folders import stats
from engine.files.place import Folder
from engine.files.publish import KEPT, move
from engine.files.thumbnails import ThumbnailCache, key_of

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
    """How long files stay, and how much room they may take; 0 means no limit."""

    keep_s: float = 0
    keep_bytes: int = 0


class _Snapshot(NamedTuple):
    """One reading of the folder."""

    folder_mtime_ns: int | None  # None: no such folder
    read_at: float  # time.monotonic() before the reading
    settled: bool  # nothing was touched so recently that its time stamp could hide a change
    by_type: Mapping[str | None, Sequence[Entry]]  # None: of every type


class Outputs:
    """The output folder. Every method may be called from any thread, and all of them block: use `asyncio.to_thread`."""

    def __init__(self, folder: Path, state: Path, retention: Retention | None = None) -> None:
        """In `state` are the thumbnails, and the whole files that could not be published when they were made."""
        self._folder, self._kept = folder, state / KEPT
        self._disk = Folder(folder, "save_path", 0, "")
        self._retention = retention or Retention()
        self._thumbnails = ThumbnailCache(state / "thumbnails")
        self._snapshot = _Snapshot(None, -math.inf, False, {})
        self._reading = threading.Lock()

    def fresh(self) -> bool:
        """Whether `listing` would answer from memory. Costs one stat, so that the event loop may ask."""
        known = self._snapshot
        valid = known.settled and time.monotonic() - known.read_at <= _MAX_AGE_S
        return valid and known.folder_mtime_ns == _mtime_ns(self._folder)

    def listing(self, file_type: str | None = None) -> Sequence[Entry]:
        """Return the media files, all or of one type, newest modification first, ties by name; none if no folder."""
        if not self.fresh():
            asked_at = time.monotonic()
            with self._reading:
                if self._snapshot.read_at < asked_at:  # else another thread has read it meanwhile
                    self._snapshot = _read(self._folder)
        return self._snapshot.by_type.get(file_type, ())

    def find(self, filename: str) -> Path | None:
        """Return the regular file of that name in the folder, else None: for links, devices, what `listing` hides."""
        path = self._folder / filename
        try:
            return path if _kind(filename) and stat.S_ISREG(path.lstat().st_mode) else None
        except (OSError, ValueError):  # no such file, a name too long, or one that the file system can't express
            return None

    def thumbnail(self, path: Path, width: int) -> Path | bytes:
        """Return the cached file of `media.thumbnail`, or its bytes if none can be written. Raises what that raises."""
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
        folders = {self._folder, self._kept}
        left = [folder / name for folder in folders for name, _ in stats(folder) if re.fullmatch(pattern, name)]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def publish_kept(self, names: Iterable[str] | None = None) -> str:
        """Publish files that are whole and could not be when they were made: these, or all of them.

        Returns why one still can't be, a sentence, else "".
        """
        if away := self._disk.away():
            return away
        if names is None:
            names = [name for name, _ in stats(self._kept) if not name.startswith(".")]
        for path in (self._kept / name for name in names if (self._kept / name).exists()):
            try:
                move(path, self._folder / path.name)
            except OSError as error:
                if path.exists():  # else the worker has just published it
                    return f"'{path.name}' can't be saved in save_path now ({error.strerror}); it is kept until it can"
        return ""

    def prepare(self) -> None:
        """Remove the oldest files beyond what is to be kept."""
        keep_s, keep_bytes = self._retention.keep_s, self._retention.keep_bytes
        entries = self.listing() if keep_s or keep_bytes else ()
        total_bytes, now = sum(entry.size_bytes for entry in entries), time.time()
        for entry in reversed(entries):
            too_old = keep_s and now - entry.modified_at > keep_s
            if not too_old and not (keep_bytes and total_bytes > keep_bytes):
                break
            (self._folder / entry.filename).unlink(missing_ok=True)
            total_bytes -= entry.size_bytes

    def highest_task_id(self) -> int:
        """Return the largest task id in a name that the worker gave, or 0: needed when the journal is lost."""
        found = (re.match(r"\.?\d{8}-\d{6}_t(\d{6,18})_", name) for name, _ in stats(self._folder))
        return max((int(match[1]) for match in found if match), default=0)


def _kind(name: str) -> str:
    """The kind of a media file; "" if it is none, or its name is unsafe."""
    _, dot, suffix = name.rpartition(".")  # pathlib would take most of the time of a large folder's listing
    kind, _ = media.MEDIA_TYPES.get(dot + suffix.lower(), ("", ""))
    return "" if _UNSAFE_NAME.search(name) else kind


def _mtime_ns(folder: Path) -> int | None:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def _read(folder: Path) -> _Snapshot:
    read_at, now = time.monotonic(), time.time()
    folder_mtime_ns = _mtime_ns(folder)  # before the files: a change during the reading then shows as one afterwards
    entries = [
        Entry(name, kind, about.st_size, min(about.st_mtime, about.st_ctime), about.st_mtime)
        for name, about in stats(folder)
        if (kind := _kind(name))
    ]
    # Two plain sorts, the second one stable: half the time of one by a pair, and a sort lets no other thread run.
    entries.sort(key=attrgetter("filename"))
    entries.sort(key=attrgetter("modified_at"), reverse=True)
    touched = [(folder_mtime_ns or 0) / 1e9, *(entry.modified_at for entry in entries)]
    settled = all(abs(now - touched_at) > _UNSETTLED_S for touched_at in touched)
    kinds: set[str | None] = {kind for kind, _ in media.MEDIA_TYPES.values()}
    by_type = {kind: tuple(entry for entry in entries if entry.type == kind) for kind in kinds}
    return _Snapshot(folder_mtime_ns, read_at, settled, {None: tuple(entries), **by_type})
