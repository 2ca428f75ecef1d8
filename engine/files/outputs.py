"""The output folder. It is the only source of truth: users may add, overwrite and delete files too."""

import errno
import logging
import math
import os
import re
import stat
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from io import BufferedReader, BytesIO
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from engine.clock import Clock
from engine.files import media
from engine.files.folders import open_regular, stats
from engine.files.owner import FolderLock
from engine.files.place import Folder
from engine.files.publish import KEPT
from engine.files.thumbnails import ThumbnailCache, key_of
from engine.job import EngineConfig

log = logging.getLogger("wangpd")
# A change within one tick of the file system's clock leaves the time stamp unchanged: 10 ms on Linux file systems,
# 1 or 2 s on FAT and some network shares. What was touched this recently may still change.
_UNSETTLED_S: Final = 2.0
# Overwriting a file in place does not change its folder's time stamp, so a snapshot expires after this long.
_MAX_AGE_S: Final = 30.0

# A leading dot (`..`, hidden files, unpublished parts), separators of any system, control characters, and the lone
# surrogates that stand for bytes that are not UTF-8 and can't be sent as JSON.
_UNSAFE_NAME: Final = re.compile(r"^\.|[\x00-\x1f\x7f-\x9f/\\\ud800-\udfff]")

_ABSENT: Final = (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV)


class Unreadable(OSError):
    """A file of the output folder is there and can't be read."""


class Entry(NamedTuple):
    """A media file of the output folder."""

    filename: str
    type: str  # video, image, audio
    size_bytes: int
    created_at: float  # epoch seconds; the earlier of mtime and ctime, as `stat` has no time of birth on Linux
    modified_at: float  # epoch seconds


class OwnFile(NamedTuple):
    """A file that this daemon made, as it was then. Whatever differs from that is a user's."""

    filename: str
    task_id: int
    size_bytes: int
    mtime_ns: int
    made_at: float  # by the Clock

    def is_same(self, about: os.stat_result) -> bool:
        """Whether it is still this file; a copy that was restored may be older."""
        newer_s = (about.st_mtime_ns - self.mtime_ns) / 1e9
        return about.st_size == self.size_bytes and newer_s <= _UNSETTLED_S


class Retention(NamedTuple):
    """How long own files stay, and how much room they may take; 0 means no limit."""

    keep_s: float = 0
    keep_bytes: int = 0


class _Snapshot(NamedTuple):
    folder_times: tuple[int, int] | None  # None: never read
    read_at: float  # time.monotonic() before the reading
    settled: bool  # nothing was touched so recently that its time stamp could hide a change
    by_type: Mapping[str | None, Sequence[Entry]]  # None: of every type


class Outputs:
    """The output folder. Every method may be called from any thread, and all of them block: use `asyncio.to_thread`."""

    def __init__(
        self,
        folder: Path,
        state: Path,
        retention: Retention | None = None,
        *,
        instance: str = EngineConfig.instance,
        clock: Clock | None = None,
        holder: str = "",
        disk: Folder | None = None,
    ) -> None:
        """`state` holds the thumbnails, and whole files that are not published yet; for `holder` see FolderLock.

        `disk` is `folder` as Place looks at it, so that both know the same of it.
        """
        self.lock = FolderLock("save_path", folder / ".wangpd.lock", holder)
        self._folder, self._kept = folder, state / KEPT
        self._instance, self._clock = instance, clock or Clock()
        self._disk = disk or Folder(folder, "save_path", 0, "")
        self._retention = retention or Retention()
        self.keeps_all = not any(self._retention)  # `prepare` has nothing to do
        self._thumbnails = ThumbnailCache(state / "thumbnails")
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
        """Return the media files, all or of one type, newest modification first, ties by name. Raises OSError."""
        if not self.fresh():
            asked_at = time.monotonic()
            with self._reading:
                if self._snapshot.read_at < asked_at:  # else another thread has read it meanwhile
                    self._snapshot = _read(self._folder)
        return self._snapshot.by_type.get(file_type, ())

    def find(self, filename: str) -> BufferedReader | None:
        """Open the regular file of that name; None where there is none: for links, devices, what `listing` hides.

        Raises Unreadable for the file, and OSError for the folder.
        """
        try:
            return open_regular(self._folder / filename) if _kind(filename) else None
        except ValueError:  # a name that the file system can't express
            return None
        except OSError as error:
            _times(self._folder)
            if error.errno in _ABSENT:
                return None
            raise Unreadable(error.errno, error.strerror) from None

    def _about(self, filename: str) -> os.stat_result | None:
        with suppress(OSError, ValueError):
            if _kind(filename) and stat.S_ISREG((about := (self._folder / filename).lstat()).st_mode):
                return about
        return None

    def thumbnail(self, file: BufferedReader, width: int) -> BinaryIO:
        """Open the cached file of `media.thumbnail`, or its bytes if none can be written. Raises what that raises."""
        key = key_of(Path(file.name).name, os.fstat(file.fileno()), width)
        if kept := self._thumbnails.get(key):
            return kept
        jpeg = media.thumbnail(file, width)
        self._thumbnails.put(key, jpeg)
        return self._thumbnails.get(key) or BytesIO(jpeg)

    def remove_attempt(self, task_id: int, made: Collection[str] = ()) -> int:
        """Delete the files of a broken attempt, whole or not, but those it has `made`; how many. Raises OSError."""
        others = "".join(rf"(?!{re.escape(name)}$)" for name in made)
        return self._remove(rf"{others}\.?{self._named(task_id)}")

    def remove_parts(self) -> int:
        """Delete the partial files of all tasks, while no worker runs; returns how many. Raises OSError."""
        return self._remove(rf"\.{self._named(None)}\.part")

    def _named(self, task_id: int | None) -> str:
        """A pattern of the names that the workers of this daemon give to the files of a task, or of all."""
        number = r"\d{6,}" if task_id is None else f"{task_id:06d}"
        return rf"\d{{8}}-\d{{6}}_t{number}-{self._instance}_.+"

    def _remove(self, pattern: str) -> int:
        folders, fault = (self._folder, self._kept), None
        left = [folder / name for folder in folders for name, _ in stats(folder) if re.fullmatch(pattern, name)]
        for path in left:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # the others are deleted
                fault = error
        if fault:
            raise fault
        return len(left)

    def publish_kept(self, names: Iterable[str] | None = None) -> str:
        """Publish whole files that could not be before: these, or all. Returns why one can't be, a sentence, or ""."""
        try:
            self._kept.parent.stat()
            kept = {name for name, _ in stats(self._kept) if not name.startswith(".")}
        except OSError:
            return "state_path can't be used now; bring the folder back"
        for path in (self._kept / name for name in kept.intersection(kept if names is None else names)):
            if (fault := self._disk.take(path)) and os.path.lexists(path):  # else the worker has just published it
                return fault
        return ""

    def made(self, task_id: int, names: Iterable[str] | None) -> list[OwnFile]:
        """What is there of these files, which a task has made right now; None: of all that bear its name."""
        now, pattern = self._clock.now(), self._named(task_id)
        if names is None:
            try:
                names = [name for name, _ in stats(self._folder) if re.fullmatch(pattern, name)]
            except OSError:  # then they stay for ever, which costs only room
                return []
        found = ((name, about) for name in names if (about := self._about(name)))
        return [OwnFile(name, task_id, about.st_size, about.st_mtime_ns, now) for name, about in found]

    def prepare(self, own: Iterable[OwnFile]) -> list[str]:
        """Delete the oldest files beyond what is to be kept; returns the names of those that are no longer `own`."""
        (keep_s, keep_bytes), (there, gone) = self._retention, self._still_there(own)
        total_bytes = sum(file.size_bytes for file, _ in there)
        for file, age_s in sorted(there, key=lambda pair: -pair[1]):
            if not (keep_s and age_s > keep_s) and not (keep_bytes and total_bytes > keep_bytes):
                break
            try:
                (self._folder / file.filename).unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s can't be deleted: %s", file.filename, error.strerror)
                continue
            total_bytes -= file.size_bytes
            gone.append(file.filename)
        return gone

    def _still_there(self, own: Iterable[OwnFile]) -> tuple[list[tuple[OwnFile, float]], list[str]]:
        """The files that are as they were made, with their age in seconds, and the names of all others."""
        found = [(file, self._about(file.filename)) for file in own]
        there, gone, now = [], [], self._clock.now()
        if not any(about for _, about in found):
            return [], []  # it is the folder that is away
        for file, about in found:
            if about is None or not file.is_same(about):
                gone.append(file.filename)
            elif file.mtime_ns - about.st_mtime_ns > _UNSETTLED_S * 1e9:  # a user has set its time
                there.append((file, min(now, time.time()) - about.st_mtime))
            else:
                there.append((file, now - file.made_at))
        return there, gone

    def highest_task_id(self) -> int:
        """Return the largest task id in a name that any worker gave, or 0: needed when the journal is lost."""
        found = (re.match(r"\.?\d{8}-\d{6}_t(\d{6,18})(-[0-9a-f]{6})?_", name) for name, _ in stats(self._folder))
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
