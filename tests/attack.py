"""A daemon behind the proxy as it is published, both under attack; and what that costs honest clients and the machine.

The attacks are in tests/attacks.py, the honest clients in tests/honest.py. Attackers come from eight addresses, each of
them directly or through the proxy.
"""

import contextlib
import itertools
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tests.daemon import ROOT, Daemon
from tests.honest import LOGIN, PASSWORD, USER, Sample
from tests.processes import children, eventually
from tests.wire import Answer, answered

MIB = 2**20
MAX_BODY_MB, MOST_CONNECTIONS = 64, {False: 60, True: 500}  # by: at full size
MOST_BYTES = 400 * MIB + 4 * MAX_BODY_MB * MIB  # of the daemon and what it has started: and one budget of bodies
HEALTH_S, SUBMISSION_S = 0.2, 2.0
WATCHDOG_S, STARVED_S = 1, 15.0  # told to the daemon, and the longest silence: systemd's unit would end it after 30
MOST_LOG_BYTES = 512 * 1024  # that all of them may write
LOG_BYTES, STATE_BYTES = 64 * 1024, 4 * MIB  # that an attack may leave behind
MOST_PREVIEW_BYTES = 260 * MIB  # of the cache, which is let go by its own limit and is worth keeping
DESCRIPTORS = 24  # more or less, by the honest clients who come and go
SETTLE_S = 90.0  # until all is as before; far above, so that it only ends a hang
BROKEN = {*range(500, 600)} - {501, 503, 505}  # nginx says that it does not know such a method or version of HTTP
SOURCES = [f"127.0.0.{number}" for number in range(2, 10)]
DOORS = ("direct", "nginx")
PATIENCE_S = 90
NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
worker_rlimit_nofile 8192;
events {{ worker_connections 4000; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
{published}
}}
"""


# ------------------------------------------------------------------------------------------------------------ the proxy


def published() -> str:
    """The configuration of nginx that people are told to use."""
    return (ROOT / "deploy" / "nginx.conf").read_text()


def substituted(text: str, port: int, upstream: int, users: Path) -> str:
    """The same for this machine: without TLS, on `port`, with these users."""
    for pattern, replacement in (
        (r"listen\s+\[::\][^;]*;", ""),
        (r"listen\s+443[^;]*;", f"listen 127.0.0.1:{port};"),
        (r"\b(ssl_\w+|http2)\s[^;]*;", ""),
        (r"auth_basic_user_file\s+[^;]*;", f"auth_basic_user_file {users};"),
        (r"127\.0\.0\.1:7860", f"127.0.0.1:{upstream}"),
    ):
        text = re.sub(pattern, replacement, text)
    return text


@contextlib.contextmanager
def proxy(program: str, folder: Path, port: int, upstream: int) -> Iterator[str]:
    """The address of a running nginx."""
    folder.mkdir()
    users = folder / "users"
    users.write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n")
    configured = NGINX.format(folder=folder, published=substituted(published(), port, upstream, users))
    (folder / "nginx.conf").write_text(configured)
    with subprocess.Popen([program, "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]) as server:
        try:
            assert eventually(lambda: server.poll() is None and listens(port)), (folder / "error.log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def listens(port: int) -> bool:
    """True if somebody does on this port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


# ------------------------------------------------------------------------------------------------------------- watchers


class Supervisor:
    """Listens as systemd does, and remembers when the watchdog was notified."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.beats: list[float] = []
        self._thread = threading.Thread(target=self._listen, name="supervisor", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with suppress(OSError):
            while said := self._socket.recv(65536):
                if b"WATCHDOG=1" in said:
                    self.beats.append(time.monotonic())

    def close(self) -> None:
        """End it."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def longest_gap_s(self, began: float) -> float:
        """Between two notifications, from the last one before `began` until now."""
        before = [beat for beat in self.beats if beat <= began][-1:]
        times = [*before, *(beat for beat in self.beats if beat > began), time.monotonic()]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


class Crowd:
    """The honest clients' process, and what they have seen so far."""

    def __init__(self, urls: Sequence[str]) -> None:
        command = [sys.executable, "-m", "tests.honest", *urls]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.samples: list[Sample] = []
        self._thread = threading.Thread(target=self._read, name="honest", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.samples.append(Sample(*json.loads(line)))

    def since(self, began: float) -> list[Sample]:
        """What has ended since then."""
        return [sample for sample in self.samples if sample.began + sample.seconds >= began]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._thread.join()
        assert self._process.stdout
        self._process.stdout.close()


@dataclass(frozen=True)
class Holding:
    """What the daemon has of the machine, with the processes that check files for it."""

    resident_bytes: int
    descriptors: int
    state_bytes: int  # but for the cache of previews
    log_bytes: int
    preview_bytes: int

    @classmethod
    def of(cls, daemon: Daemon) -> "Holding":
        """As it is now. Raises OSError if it is not there."""
        pid = daemon.process.pid
        resident = resident_bytes(pid) + sum(map(shared_out_bytes, helpers(pid)))
        descriptors, previews = len(list(Path(f"/proc/{pid}/fd").iterdir())), folder_bytes(daemon.state / "thumbnails")
        state_bytes = folder_bytes(daemon.state) - previews
        return cls(resident, descriptors, state_bytes, daemon.log.stat().st_size, previews)


def helpers(pid: int) -> set[int]:
    """What it has started: nothing is generated here, so that all of it checks or fetches."""
    with suppress(OSError):
        return {inner for child in children(pid) for inner in (child, *helpers(child))}
    return set()


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def shared_out_bytes(pid: int) -> int:
    """Resident memory, of what is shared only its part; 0 once it is gone."""
    with suppress(OSError, IndexError):
        about = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(re.findall(r"^Pss:\s+(\d+) kB$", about, re.MULTILINE)[0]) * 1024
    return 0


def folder_bytes(folder: Path) -> int:
    """Of all files in it."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # removed meanwhile
            total += path.lstat().st_size
    return total


class Sampler:
    """A thread that looks all the time; a context manager."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon, self._over = daemon, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sampler")
        self.resident_bytes = self.state_bytes = self.descriptors = 0

    def __enter__(self) -> "Sampler":
        with suppress(OSError):
            Path(f"/proc/{self._daemon.process.pid}/clear_refs").write_text("5")  # the kernel forgets the peak
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError, IndexError):  # the daemon's own, between two looks
            about = Path(f"/proc/{self._daemon.process.pid}/status").read_text()
            peak = int(re.findall(r"^VmHWM:\s+(\d+) kB$", about, re.MULTILINE)[0]) * 1024
            self.resident_bytes = max(self.resident_bytes, peak)

    def _watch(self) -> None:
        while not self._over.wait(0.03):
            with suppress(OSError):
                now = Holding.of(self._daemon)
                self.resident_bytes = max(self.resident_bytes, now.resident_bytes)
                self.state_bytes = max(self.state_bytes, now.state_bytes)
                self.descriptors = max(self.descriptors, now.descriptors)


# ------------------------------------------------------------------------------------------------------------ attackers


class Field:
    """What an attack has at its hand: connections from many addresses through both doors, and its own size.

    `scale` 1 is the full size. Everything that is answered is counted in `answers`, by status; 0 is no answer.
    """

    def __init__(self, daemon: Daemon, urls: Sequence[str], scale: float, workshop: Path) -> None:
        self.daemon, self.urls, self.scale, self.workshop = daemon, dict(zip(DOORS, urls, strict=True)), scale, workshop
        self.connections = MOST_CONNECTIONS[scale >= 1]
        self.answers: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._sources, self._turns = itertools.cycle(SOURCES), itertools.cycle(DOORS)

    @cached_property
    def is_full(self) -> bool:
        """Not only a sample of it."""
        return self.scale >= 1

    def count(self, full: int, least: int = 2) -> int:
        """How many of what is so many at full size."""
        return max(least, int(full * min(1.0, self.scale)))

    def pause(self, full_s: float) -> None:
        """Wait, at full size so long."""
        time.sleep(full_s * min(1.0, self.scale))

    def door(self) -> str:
        """The next one."""
        with self._lock:
            return next(self._turns)

    def channel(self, door: str = "", **options: int) -> socket.socket:
        """A connection from the next address. Raises OSError. `options` are of the socket, such as SO_RCVBUF."""
        with self._lock:
            source = next(self._sources)
            door = door or next(self._turns)
        _, _, place = self.urls[door].rpartition("/")
        host, _, port = place.partition(":")
        made = socket.socket()
        made.settimeout(PATIENCE_S)
        for name, value in options.items():
            made.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        try:
            made.bind((source, 0))
            made.connect((host, int(port)))
        except OSError:
            made.close()
            raise
        return made

    def crowd(self, stack: ExitStack, count: int, door: str = "", **options: int) -> list[socket.socket]:
        """So many connections, as far as they are to be had; closed with the stack."""
        made: list[socket.socket] = []
        for _ in range(count):
            with suppress(OSError):
                made.append(stack.enter_context(self.channel(door, **options)))
        return made

    def drip(self, channels: Sequence[socket.socket], byte: bytes, pause_s: float) -> None:
        """Send one byte after the other on all of these connections, for 20 s at full size."""
        ends = time.monotonic() + 20 * min(1.0, self.scale)
        while time.monotonic() < ends:
            for channel in channels:
                with suppress(OSError):
                    channel.sendall(byte)
            time.sleep(pause_s)

    def ask(self, data: bytes | Iterable[bytes], door: str = "", patience_s: float = PATIENCE_S) -> int:
        """Send a request, read its answer, and return its status; 0 if none came."""
        status = 0
        with suppress(OSError), self.channel(door) as channel:
            channel.settimeout(patience_s)
            pieces = [data] if isinstance(data, bytes) else list(data)
            with suppress(OSError):  # it answered before it had read all, and may still be heard
                for piece in pieces:
                    channel.sendall(piece)
            status = self.hear(channel, "HEAD" if pieces[0].startswith(b"HEAD") else "GET")
        if not status:
            self.tally(0)
        return status

    def hear(self, channel: socket.socket, method: str = "GET") -> int:
        """Read the answer on this connection; returns its status, 0 if none came."""
        answer = self._answer(channel, method)
        return answer.status if answer else 0

    def fetch(self, data: bytes) -> bytes:
        """Send a request directly; returns the body of its answer 200, and nothing for any other."""
        answer = None
        with suppress(OSError), self.channel("direct") as channel:
            channel.sendall(data)
            answer = self._answer(channel)
        if answer is None:
            self.tally(0)
        return answer.body if answer and answer.status == 200 else b""

    def _answer(self, channel: socket.socket, method: str = "GET") -> Answer | None:
        with suppress(OSError, HTTPException):
            answer = answered(channel, method)
            if answer is not None:
                self.tally(answer.status)
            return answer
        return None

    def tally(self, status: int, count: int = 1) -> None:
        """Count answers."""
        with self._lock:
            self.answers[status] += count

    def all_at_once(self, actions: Iterable[Callable[[], object]], most: int = 20) -> None:
        """Do all of these, so many at a time."""
        with ThreadPoolExecutor(most) as pool:
            for done in [pool.submit(action) for action in actions]:
                done.result()


def request(method: str, path: str, body: bytes | None = None, **headers: Any) -> bytes:
    """A request with the proxy's login; `_` in the name of a header stands for `-`. `body` brings its length."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    fields = {"Host": "wangpd.example.lan", **LOGIN, **named}
    if body is not None:
        fields.setdefault("Content-Length", len(body))
    lines = [f"{method} /api/v1{path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def hang_up(channel: socket.socket) -> None:
    """Close it as a process that is killed does: with a reset."""
    with suppress(OSError):
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        channel.close()


# ------------------------------------------------------------------------------------------------------------ the whole

Attack = Callable[[Field], None]


@dataclass
class Row:
    """What an attack has cost; `broken` says where the machine's bounds did not hold, `slow` where time's did not."""

    name: str
    wall_s: float = 0.0
    answers: Counter[int] = field(default_factory=Counter)
    honest: list[Sample] = field(default_factory=list)
    peak_bytes: int = 0
    descriptors: int = 0
    log_bytes: int = 0
    state_peak_bytes: int = 0
    state_bytes: int = 0
    silence_s: float = 0.0
    broken: list[str] = field(default_factory=list)

    def worst(self, *errands: str) -> Sample | None:
        """The honest request of these kinds that took longest."""
        return max((one for one in self.honest if one.errand in errands), key=lambda one: one.seconds, default=None)

    @property
    def slow(self) -> list[str]:
        """Where an honest client had to wait too long, or was sent away."""
        faults = [f"the watchdog was silent for {self.silence_s:.1f} s"] * (self.silence_s >= STARVED_S)
        for errands, most in ((("health",), HEALTH_S), (("dry run", "submission", "picture"), SUBMISSION_S)):
            worst = self.worst(*errands)
            if worst is not None and worst.seconds > most:
                faults.append(f"{worst.errand} ({worst.door}) took {worst.seconds:.2f} s, and may take {most} s")
        refused = Counter((one.errand, one.door, one.status) for one in self.honest if one.status != 200)
        return faults + [
            f"{errand} ({door}): {status} {count} times" for (errand, door, status), count in refused.items()
        ]

    def __str__(self) -> str:
        health, submission = self.worst("health"), self.worst("dry run", "submission", "picture")
        answers = " ".join(f"{status or 'none'}x{count}" for status, count in sorted(self.answers.items()))
        return LINE.format(
            self.name,
            f"{self.wall_s:.1f}",
            f"{health.seconds * 1000:.0f}" if health else "-",
            f"{submission.seconds * 1000:.0f}" if submission else "-",
            f"{self.peak_bytes / MIB:.0f}",
            f"{self.log_bytes / 1024:.0f}",
            f"{self.state_peak_bytes / MIB:.1f}",
            f"{self.state_bytes / MIB:+.1f}",
            f"{self.silence_s:.1f}",
            f"{self.descriptors}",
            answers,
        )


LINE = "{:32} {:>7} {:>9} {:>9} {:>6} {:>6} {:>8} {:>7} {:>6} {:>6}  {}"
TITLE = LINE.format(
    *("attack", "wall s", "health ms", "submit ms", "MiB", "log KiB", "state", "left", "quiet", "fds", "answers")
)


class Siege:
    """The daemon, the proxy in front of it and the honest clients; attacks are made one after the other."""

    def __init__(self, folder: Path, scale: float) -> None:
        self._folder, self._scale, self._workshop = folder, scale, folder / "workshop"
        self._workshop.mkdir()
        self._supervisor = Supervisor(folder / "notify")
        self._port = free_port()
        config = {
            "port": self._port,
            "trusted_proxies": ["127.0.0.1"],
            "allowed_hosts": ["wangpd.example.lan", "127.0.0.1"],
        }
        most = MOST_CONNECTIONS[scale >= 1]
        self.daemon = Daemon(folder / "own", **config, history_count=50, max_connections=most)
        self.daemon.environment |= {
            "NOTIFY_SOCKET": str(self._supervisor.path),
            "WATCHDOG_USEC": str(WATCHDOG_S * 1_000_000),
        }
        self.rows: list[Row] = []
        self.first: Holding | None = None  # after the first attack, which brings in what is imported when needed
        self._stack = ExitStack()

    def __enter__(self) -> "Siege":
        program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
        assert program, "nginx is not installed: sudo apt-get install nginx-light"
        with ExitStack() as stack:
            stack.callback(self._supervisor.close)
            stack.callback(self.daemon.stop)
            self.stand()
            url = stack.enter_context(proxy(program, self._folder / "nginx", free_port(), self._port))
            self._urls = (self.daemon.url, url)
            self._honest = Crowd(self._urls)
            stack.callback(self._honest.close)
            assert eventually(lambda: len({(one.door, one.errand) for one in self._honest.samples}) == 8, 60)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def stand(self) -> None:
        """Start the daemon, with a queue that waits; after an attack that ended it, again."""
        self.daemon.start()
        assert self.daemon.post("/queue/pause").status_code == 200

    def endure(self, name: str, attack: Attack) -> Row:
        """Make one attack, and report what it did."""
        if self.daemon.process.poll() is not None:
            self.stand()
        field = Field(self.daemon, self._urls, self._scale, self._workshop)
        before, began = Holding.of(self.daemon), time.monotonic()
        row = Row(name)
        self.rows.append(row)
        with Sampler(self.daemon) as sampler:
            attack(field)
            row.wall_s = time.monotonic() - began
            self._settle(row, before)
        row.answers, row.honest = field.answers, self._honest.since(began)
        row.peak_bytes, row.descriptors = sampler.resident_bytes, sampler.descriptors
        row.state_peak_bytes = sampler.state_bytes
        row.silence_s = self._supervisor.longest_gap_s(began)
        row.broken += self._judge(row)
        self.first = self.first or Holding.of(self.daemon)
        return row

    def left_behind(self) -> list[str]:
        """What all attacks together have left, a sentence each."""
        assert self.first
        now = Holding.of(self.daemon)
        faults = grown(self.first, now)
        if now.log_bytes > MOST_LOG_BYTES:
            faults.append(f"{now.log_bytes / 1024:.0f} KiB of log, and may have {MOST_LOG_BYTES / 1024:.0f}")
        return faults

    def _settle(self, row: Row, before: Holding) -> None:
        """Wait until all is as before and the daemon answers everywhere; what does not come to be is a fault."""
        ended = time.monotonic()
        awaited: dict[str, Callable[[], bool]] = {
            "is as before": lambda: not grown(before, Holding.of(self.daemon)),
            "answers on /health directly": lambda: self._answers("direct", "health", ended),
            "answers on /health through nginx": lambda: self._answers("nginx", "health", ended),
            "takes a submission": lambda: self._answers("direct", "submission", ended),
            "takes a picture": lambda: self._answers("direct", "picture", ended),
            "notifies the watchdog": lambda: any(beat > ended for beat in self._supervisor.beats),
        }
        for what, test in awaited.items():
            if self.daemon.process.poll() is not None:
                row.broken.append(f"the daemon has ended: exit code {self.daemon.process.returncode}")
                return
            if not eventually(test, max(1.0, ended + SETTLE_S - time.monotonic())):
                held = grown(before, Holding.of(self.daemon)) if what == "is as before" else []
                row.broken += held or [f"the daemon no longer {what}"]
        now = Holding.of(self.daemon)
        row.log_bytes, row.state_bytes = now.log_bytes - before.log_bytes, now.state_bytes - before.state_bytes
        with self.daemon.log.open("rb") as log:
            log.seek(before.log_bytes)
            if b"Traceback" in (written := log.read()):
                row.broken.append("a traceback in the log: " + written.decode(errors="replace")[-600:])

    def _answers(self, door: str, errand: str, since: float) -> bool:
        seen = self._honest.since(since)
        return any((one.door, one.errand, one.status) == (door, errand, 200) and one.began >= since for one in seen)

    @staticmethod
    def _judge(row: Row) -> list[str]:
        answers = row.answers + Counter(one.status for one in row.honest)
        faults = [f"{count} answers {status}" for status, count in answers.items() if status in BROKEN]
        if row.peak_bytes > MOST_BYTES:
            faults.append(f"{row.peak_bytes / MIB:.0f} MiB of memory, and may take {MOST_BYTES / MIB:.0f}")
        if row.log_bytes > LOG_BYTES:
            faults.append(f"{row.log_bytes / 1024:.0f} KiB of log, and may write {LOG_BYTES / 1024:.0f}")
        return faults

    def report(self) -> str:
        """A table of all attacks so far."""
        return "\n".join([TITLE, *map(str, self.rows)])


def grown(before: Holding, now: Holding) -> list[str]:
    """What is held too much, a sentence each."""
    faults = {
        f"memory: {before.resident_bytes / MIB:.0f} MiB became {now.resident_bytes / MIB:.0f}": (
            now.resident_bytes > 1.15 * before.resident_bytes + 32 * MIB
        ),
        f"descriptors: {before.descriptors} became {now.descriptors}": now.descriptors
        > before.descriptors + DESCRIPTORS,
        f"state: {before.state_bytes / MIB:.1f} MiB became {now.state_bytes / MIB:.1f}": (
            now.state_bytes > before.state_bytes + STATE_BYTES
        ),
        f"previews: {now.preview_bytes / MIB:.0f} MiB": now.preview_bytes > MOST_PREVIEW_BYTES,
    }
    return [sentence for sentence, fault in faults.items() if fault]
