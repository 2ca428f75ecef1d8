"""Small disks of a daemon's own, which a test fills, makes read-only, takes away and brings back."""

import os
import subprocess
from pathlib import Path
from typing import Any

from tests.daemon import Daemon

# A mount namespace of its own: nothing is left behind on the machine, however the test ends. Not root, one needs a
# user namespace for that.
UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
ENTER = ["--mount"] if os.geteuid() == 0 else ["--user", "--preserve-credentials", "--mount"]


class Disk:
    """A tmpfs that only the daemon sees, at `path`."""

    def __init__(self, daemon: Daemon, path: Path, size_mb: int) -> None:
        self._daemon, self._path, self._size_mb = daemon, path, size_mb
        path.mkdir(parents=True, exist_ok=True)

    @property
    def seen(self) -> Path:
        """Its path for this process."""
        return Path(f"/proc/{self._daemon.process.pid}/root{self._path}")

    @property
    def command(self) -> str:
        """What mounts it."""
        return f"mount -t tmpfs -o size={self._size_mb}m tmpfs {self._path}"

    def _run(self, command: str) -> None:
        pid = str(self._daemon.process.pid)
        subprocess.run(["nsenter", "--target", pid, *ENTER, "sh", "-c", command], check=True)

    def fill(self) -> None:
        """Take all of its room."""
        with (self.seen / "filler").open("wb", buffering=0) as file:
            chunk = bytes(2**16)
            try:
                while file.write(chunk):
                    pass
            except OSError:
                return

    def free(self) -> None:
        """Give that room back."""
        (self.seen / "filler").unlink()

    def read_only(self, on: bool) -> None:
        """Let no file be made, or let it again; what is open for writing can be written."""
        cover = f"mount --bind {self._path} {self._path} && mount -o remount,bind,ro {self._path}"
        self._run(cover if on else f"umount --lazy {self._path}")

    def remount(self, how: str) -> None:
        """Make the disk itself "ro" or "rw", which fails while a file on it is open for writing."""
        self._run(f"mount -o remount,{how} {self._path}")

    def take_away(self) -> None:
        """Unmount it: an empty folder is left in its place."""
        self._run(f"umount --lazy {self._path}")

    def bring_back(self) -> None:
        """Mount an empty one."""
        self._run(self.command)


class DaemonWithDisks(Daemon):
    """A daemon with a disk for its outputs and, with `state_mb`, one for its state; each start has empty ones."""

    def __init__(self, folder: Path, *, state_mb: int = 0, **config: Any) -> None:
        super().__init__(folder, **{"min_free_mb": 1, **config})
        self.outputs_disk, self.state_disk = Disk(self, self.outputs, 16), Disk(self, self.state, state_mb)
        mounts = [disk.command for disk in (self.outputs_disk, self.state_disk) if disk._size_mb]
        self.launcher = [*UNSHARE, "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]
