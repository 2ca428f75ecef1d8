"""The place in which a daemon works: small disks that fill up, folders that are away or can't be written to.

Disks are mounted in a namespace of their own, so that the machine is left as it was, however the tests end.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

# For root, then for anybody else; where that is allowed, all that is started there ends with the first process.
NAMESPACES = (
    ("unshare", "-mpf", "--mount-proc", "--kill-child"),
    ("unshare", "-Urmpf", "--mount-proc", "--kill-child"),
    ("unshare", "-m"),
    ("unshare", "-Urm"),
)
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
LOCK = ".wangpd.lock"
DISK_BYTES = 96 * 2**20


@cache
def namespace() -> Sequence[str]:
    """What a command has to begin with in order to mount disks that nobody else sees; nothing where none may."""
    for prefix in NAMESPACES:
        trial = [*prefix, "sh", "-c", "mount -t tmpfs -o size=1m none /mnt && mount --bind /mnt /mnt"]
        with suppress(FileNotFoundError):
            if subprocess.run(trial, capture_output=True, check=False).returncode == 0:
                return prefix
    return ()


def obey_permissions() -> None:
    """Let what this process starts obey the permissions of files, though it may be root's."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


class Disk:
    """A small disk, if disks can be mounted here, and a folder of it in a place of its own: what a daemon uses."""

    def __init__(self, root: Path, name: str, *, mounted: bool) -> None:
        self.mounted, self._root = mounted, root / f"{name}_disk"
        self.folder, self._disk = self._root / "place" / name, self._root / "disk"
        self.strays: list[str] = []  # what was put where the folder was not
        for path in (self.folder, self._disk):
            path.mkdir(parents=True)
        if mounted:
            mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", self._disk)
            (self._disk / "content").mkdir()
            self._mount()

    def _mount(self) -> None:
        mount("--bind", self._disk / "content", self.folder)

    def unmount(self) -> None:
        """Let go of it."""
        for path in (self.folder, self._disk) if self.mounted else ():
            subprocess.run(["umount", "-l", path], check=False)

    @contextmanager
    def unmounted(self) -> Iterator[None]:
        """Within, the folder is empty: what is mounted there otherwise is not."""
        unmount(self.folder)
        try:
            yield
        finally:
            self._take_strays(self.folder)
            self._mount()

    @contextmanager
    def filled(self, leave_bytes: int = 0) -> Iterator[None]:
        """Within, no more than `leave_bytes` are free."""
        filler = self._disk / "filler"
        with filler.open("wb") as file:
            for piece_bytes in (2**20, 2**12):
                with suppress(OSError):
                    while shutil.disk_usage(self._disk).free > leave_bytes:
                        os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), piece_bytes)
        try:
            yield
        finally:
            filler.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Within, nothing can be made in the folder or removed; files that are open can be written to all the same."""
        if self.mounted:
            self._mount_read_only()
        else:
            self.folder.chmod(0o555)
        try:
            yield
        finally:
            if self.mounted:
                unmount(self.folder)
            else:
                self.folder.chmod(0o755)

    def _mount_read_only(self) -> None:
        mount("--bind", self.folder, self.folder)
        while subprocess.run(
            ["mount", "-o", "remount,bind,ro", self.folder], capture_output=True, check=False
        ).returncode:
            unmount(self.folder)  # a file has been opened there meanwhile, to be written to
            mount("--bind", self.folder, self.folder)

    @contextmanager
    def forbidden(self) -> Iterator[None]:
        """Within, its permissions let nobody write into the folder."""
        self.folder.chmod(0o555)
        try:
            yield
        finally:
            self.folder.chmod(0o755)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within, there is no such folder."""
        elsewhere = self._root / "elsewhere"
        self.folder.parent.rename(elsewhere)
        try:
            yield
        finally:
            self._take_strays(self.folder.parent)
            elsewhere.rename(self.folder.parent)

    def _take_strays(self, place: Path) -> None:
        """Note and remove what is there; a daemon's lock is no loss."""
        found = [path for path in place.rglob("*") if path.name != LOCK]
        self.strays += [str(path.relative_to(self._root)) for path in found]
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if place != self.folder and place.exists():
            place.rmdir()


def mount(*arguments: str | Path) -> None:
    """Run mount(8)."""
    subprocess.run(["mount", *arguments], check=True)


def unmount(path: Path) -> None:
    """Take away what was mounted last, though some file of it may be open."""
    subprocess.run(["umount", "-l", path], check=True)


FOREIGN_AT = 1_560_000_000  # in 2019: older than anything that is to be kept
FOREIGN = (
    *("holiday.mp4", "film of 1999.mp4", "picture.jpg", "song.mp3", "notes.txt", "trip_t000001_.mp4"),
    *(".hidden.mp4", ".nfs000000012", ".directory", ".trip.mp4.part", ".holiday.mp4.part", "album/inside.mp4"),
    # Of an earlier daemon, and of another one.
    *("20250101-120000_t000001_my-own_s1.mp4", ".20250101-120000_t000002_my-own_s1.mp4.part"),
    *("20250101-120000_t000001-0dd5f0_other_s1.mp4", ".20250101-120000_t000002-0dd5f0_other_s1.mp4.part"),
    *("20250101-120000_t000003-0dd5f00d_other_s1.mp4", ".20250101-120000_t000003-0dd5f00d_other_s1.mp4.part"),
)


class Foreigners:
    """Files of a folder that are not the daemon's, old and of any name."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._known = folder, set[str]()
        for name in FOREIGN:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(name.encode() * 5000)
            os.utime(path, (FOREIGN_AT, FOREIGN_AT))
        (folder / "link.mp4").symlink_to("holiday.mp4")
        self.names = {Path(name).parts[0] for name in FOREIGN} | {"link.mp4"}

    def touched(self) -> list[str]:
        """What has become of them since it was last asked, a sentence each; nothing if they are as they were."""
        found = {name: self._fault(name) for name in FOREIGN if name not in self._known}
        if "link.mp4" not in self._known and not (self._folder / "link.mp4").is_symlink():
            found["link.mp4"] = "is gone"
        faults = {name: fault for name, fault in found.items() if fault}
        self._known.update(faults)
        return [f"{name} {fault}" for name, fault in faults.items()]

    def _fault(self, name: str) -> str:
        path = self._folder / name
        if not path.is_file():
            return "is gone"
        if path.read_bytes() != name.encode() * 5000:
            return "has other bytes"
        return "" if path.stat().st_mtime == FOREIGN_AT else "has another time"
