"""What systemd sees of the daemon: the sd_notify protocol over a real socket, signals, exit codes, and its memory."""

import asyncio
import os
import re
import signal
import socket
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import wangpd
from tests.daemon import Daemon

MAX_IDLE_BYTES = 60 * 2**20
PATIENCE_S = 60  # far above what any of this takes, so that it only ends a hang
FAST_WATCHDOG_S = 0.4  # so that the status comes often


class Systemd:
    """The end of NOTIFY_SOCKET that systemd holds."""

    def __init__(self, channel: socket.socket, address: str) -> None:
        self._channel = channel
        self.address = address

    def hear(self) -> list[str]:
        """The lines of the next message."""
        return self._channel.recv(4096).decode().splitlines()

    def hear_until(self, line: str) -> list[list[str]]:
        """All messages up to the one in which a line is `line`, a regular expression."""
        heard = [self.hear()]
        deadline = time.monotonic() + PATIENCE_S
        while not any(re.fullmatch(line, said) for said in heard[-1]):
            assert time.monotonic() < deadline, heard
            heard.append(self.hear())
        return heard

    def heard(self) -> Iterator[list[str]]:
        """The messages that have come and that nobody has heard yet."""
        self._channel.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                yield self.hear()

    def environment(self, watchdog_s: float = 30.0) -> dict[str, str]:
        """What a unit gets with Type=notify and WatchdogSec=."""
        return {**os.environ, "NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": str(round(watchdog_s * 1e6))}


@contextmanager
def listening(address: str) -> Iterator[Systemd]:
    """systemd's socket at `address`; a leading `@` stands for the abstract namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("\0" + address[1:] if address.startswith("@") else address)
        channel.settimeout(PATIENCE_S)
        yield Systemd(channel, address)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    with listening(str(tmp_path / "notify")) as there:
        yield there


def worker_pid(daemon: Daemon) -> int:
    """The generation process: of the daemon's children the one that was spawned to work."""
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text().split()
    (pid,) = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return int(pid)


def lives(pid: int) -> bool:
    """False for a process that has ended, also if nobody has asked for its exit code yet."""
    with suppress(FileNotFoundError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


# ---- sd_notify


def test_ready_is_said_with_the_queue_once_the_socket_listens(systemd: Systemd, own_daemon: Daemon) -> None:
    own_daemon.environment = systemd.environment()
    own_daemon.start()
    assert systemd.hear_until("READY=1")[-1] == ["READY=1", "STATUS=idle, 0 waiting"]
    socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(own_daemon.url).port)).close()


def test_sigterm_is_answered_with_stopping_and_exit_code_0(systemd: Systemd, own_daemon: Daemon) -> None:
    own_daemon.environment = systemd.environment()
    own_daemon.start()
    assert own_daemon.stop(signal.SIGTERM) == 0
    said = [line for message in systemd.heard() for line in message]
    assert said.count("READY=1") == said.count("STOPPING=1") == 1
    assert said.index("READY=1") < said.index("STOPPING=1")


def test_ctrl_c_is_an_orderly_end_too(own_daemon: Daemon) -> None:
    own_daemon.start()
    assert own_daemon.stop(signal.SIGINT) == 0


def test_a_start_that_fails_never_says_ready(systemd: Systemd, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        hindered = Daemon(tmp_path / "own", port=taken.getsockname()[1])
        hindered.environment = systemd.environment()
        with pytest.raises(AssertionError, match="is taken"):
            hindered.start()
    assert hindered.stop() == 1
    assert not any("READY=1" in message for message in systemd.heard())


def test_an_abstract_socket_hears_the_same(own_daemon: Daemon) -> None:
    with listening(f"@wangpd-test-{os.getpid()}") as systemd:
        own_daemon.environment = systemd.environment()
        own_daemon.start()
        assert "READY=1" in systemd.hear_until("READY=1")[-1]


def test_a_socket_that_nobody_holds_does_not_matter(tmp_path: Path, own_daemon: Daemon) -> None:
    own_daemon.environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "nobody")}
    own_daemon.start()
    assert own_daemon.get("/health").status_code == 200


def test_a_supervisor_that_does_not_read_never_blocks_the_daemon(systemd: Systemd) -> None:
    supervisor = supervisor_of(systemd, watchdog_s=30)
    for _ in range(2000):  # more than a kernel queues for a socket
        supervisor.notify("WATCHDOG=1")
    assert systemd.hear() == ["WATCHDOG=1"]


class NoTasks:
    """What a Supervisor asks of an empty queue."""

    at_work: tuple[Any, ...] = ()
    paused = False
    faults: Mapping[str, str] = {}

    def listing(self) -> list[Any]:
        return []


def supervisor_of(systemd: Systemd, watchdog_s: float) -> wangpd.Supervisor:
    """A Supervisor in this process that speaks to `systemd`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):
            patch.setenv(name, systemd.environment(watchdog_s)[name])
        return wangpd.Supervisor(NoTasks())  # type: ignore[arg-type]


async def test_the_watchdog_is_fed_at_half_its_interval(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", pause)
    with suppress(asyncio.CancelledError):
        await supervisor_of(systemd, watchdog_s=30).watch()
    assert pauses == [15, 15, 15]
    assert list(systemd.heard()) == [["WATCHDOG=1", "STATUS=idle, 0 waiting"]] * 3


def test_the_status_tells_what_runs_and_how_much_waits(systemd: Systemd, own_daemon: Daemon) -> None:
    own_daemon.environment = systemd.environment(FAST_WATCHDOG_S)
    own_daemon.start()
    first, _ = own_daemon.submit(), own_daemon.submit()
    assert "WATCHDOG=1" in systemd.hear_until(f"STATUS=task {first['task_id']} runs, 1 waiting")[-1]


# ---- signals while it works


@pytest.fixture
def hanging(tmp_path: Path, systemd: Systemd) -> Iterator[Daemon]:
    """A daemon with a running task whose process does not react to anything but SIGKILL."""
    daemon = Daemon(tmp_path / "own", stop_grace_s=3600.0, cancel_grace_s=3600.0)
    daemon.environment = systemd.environment()
    daemon.start()
    try:
        task = daemon.submit()["task_id"]
        daemon.until(task, lambda state: state["phase"])
        os.kill(worker_pid(daemon), signal.SIGSTOP)
        yield daemon
    finally:
        daemon.stop(signal.SIGKILL)


def test_a_second_sigterm_ends_it_at_once_with_its_worker(hanging: Daemon, systemd: Systemd) -> None:
    worker = worker_pid(hanging)
    hanging.process.send_signal(signal.SIGTERM)
    systemd.hear_until("STOPPING=1")
    assert hanging.process.poll() is None  # it would wait for an hour
    assert hanging.stop(signal.SIGTERM) == 1
    assert not lives(worker)


def test_after_a_second_sigterm_the_task_is_still_there(hanging: Daemon, systemd: Systemd) -> None:
    hanging.process.send_signal(signal.SIGTERM)
    systemd.hear_until("STOPPING=1")
    hanging.stop(signal.SIGTERM)
    hanging.start()
    assert hanging.status(1)["status"] in ("queued", "processing")


# ---- memory


def test_an_idle_daemon_is_small(own_daemon: Daemon) -> None:
    own_daemon.start()
    assert own_daemon.get("/health").status_code == 200
    about = Path(f"/proc/{own_daemon.process.pid}/status").read_text()
    (resident_kib,) = re.findall(r"^VmRSS:\s+(\d+) kB$", about, re.MULTILINE)
    assert int(resident_kib) * 1024 < MAX_IDLE_BYTES
