"""Clients that do harm: they send half of what they should, hang up on what they asked for, or come in crowds."""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

import requests

from tests import hostile
from tests.daemon import Daemon
from tests.wire import Answer, answered, connected, exchange, head

CROWD = 90  # connections at a time; let the daemon take fewer
CORPUS = [  # without those that may end a task, or make one again
    attack for name, attacks in hostile.CLASSES.items() if name not in ("paths", "connections") for attack in attacks()
]
Judge = Callable[[str, Answer], None]


class Raiders:
    """A thread that plays all of them. `judge` is called with each answer, and `gate` is held during each raid."""

    def __init__(self, daemon: Daemon, seed: int, judge: Judge, gate: threading.RLock) -> None:
        self._daemon, self._judge, self._gate = daemon, judge, gate
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._rove, name="raiders")
        self.raids: Counter[str] = Counter()

    def __enter__(self) -> "Raiders":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _rove(self) -> None:
        while not self._over.wait(self._random.uniform(0, 0.5)):
            raid = self._random.choice(list(RAIDS))
            with self._gate:
                self.raid(raid)

    def raid(self, name: str) -> None:
        """Do this one. A daemon that hangs up, or is not there, is no fault."""
        self.raids[name] += 1
        with suppress(OSError, requests.RequestException):
            RAIDS[name](self)

    # -- half of a request

    def half_open(self) -> None:
        """Many connections on which nothing comes, or not all of a head."""
        with ExitStack() as stack:
            channels = [stack.enter_context(self.connect()) for _ in range(20)]
            for channel in channels[::2]:
                channel.sendall(b"GET /api/v1/queue HTT")
            time.sleep(self._random.uniform(0, 0.3))

    def slow_body(self) -> None:
        """A body that comes byte by byte, whole in the end: it's no request."""
        body = b'{"prompt": 1}'
        with self.connect() as channel:
            channel.sendall(head("/api/v1/generate", "POST", Content_Type="application/json", Content_Length=len(body)))
            for byte in body:
                channel.sendall(bytes([byte]))
                time.sleep(0.02)
            self.look("a slow body", answered(channel))

    def torn_body(self) -> None:
        """A body of which the rest never comes."""
        with self.connect() as channel:
            channel.sendall(head("/api/v1/generate", "POST", Content_Type="application/json", Content_Length=5000))
            channel.sendall(b'{"prompt": "half')
            hang_up(channel)

    def huge_body(self) -> None:
        """One that is said to be larger than may be, and one that turns out so."""
        with self.connect() as channel:
            channel.sendall(head("/api/v1/generate", "POST", Content_Type="application/json", Content_Length=10**11))
            self.look("a huge body", answered(channel))
        with self.connect() as channel, suppress(ConnectionError):
            fields = {"Content_Type": "application/json", "Transfer_Encoding": "chunked"}
            channel.sendall(head("/api/v1/generate", "POST", **fields))
            for _ in range(60):
                channel.sendall(b"10000\r\n" + b"a" * 2**16 + b"\r\n")
            self.look("an endless body", answered(channel))

    # -- what is no request

    def garbage(self) -> None:
        """No HTTP at all."""
        attack = self._random.choice(list(hostile.connections()))
        with self.connect() as channel:
            channel.sendall(attack.request)
            channel.shutdown(socket.SHUT_WR)
            self.look(attack.label, answered(channel))

    def corpus(self) -> None:
        """Some of the hostile requests that there are."""
        for attack in self._random.sample(CORPUS, 10):
            self.look(attack.label, exchange(self._daemon.url, attack.request))

    def wrong_ranges(self) -> None:
        """Ranges that are none, or that are many, of a file that is there."""
        if name := self.a_file():
            for sent in self._random.sample(hostile.RANGES, 3):
                self.look(f"range {sent[:20]}", self.get(f"/download/{name}", Range=sent))

    # -- hanging up

    def torn_download(self) -> None:
        """Hang up within a file."""
        if name := self.a_file():
            with self.connect() as channel:
                channel.sendall(head(f"/api/v1/download/{name}"))
                channel.recv(100)
                hang_up(channel)

    def torn_wait(self) -> None:
        """Hang up while waiting for a task."""
        with self.connect() as channel:
            channel.sendall(head(f"/api/v1/status/{self.a_task()}?wait=60"))
            time.sleep(self._random.uniform(0, 0.2))
            hang_up(channel)

    def torn_stream(self) -> None:
        """Hang up within a stream of events, without reading it."""
        with self.connect() as channel:
            channel.sendall(head("/api/v1/events"))
            time.sleep(self._random.uniform(0, 0.3))
            hang_up(channel)

    # -- crowds

    def flood(self) -> None:
        """More connections than the daemon takes, each with a request."""
        with ExitStack() as stack:
            channels = [stack.enter_context(self.connect()) for _ in range(CROWD)]
            for channel in channels:
                with suppress(ConnectionError):
                    channel.sendall(head("/api/v1/queue", Connection="close"))
            for channel in channels:
                self.look("a flood", answered(channel))

    # -- what all of them need

    def connect(self) -> socket.socket:
        return connected(self._daemon.url)

    def get(self, path: str, **headers: str) -> Answer | None:
        return exchange(self._daemon.url, head(f"/api/v1{path}", **headers))

    def a_file(self) -> str | None:
        answer = requests.get(f"{self._daemon.url}/api/v1/outputs?limit=20", timeout=30)
        files = answer.json()["data"]["files"] if answer.ok else []
        return self._random.choice(files)["filename"] if files else None

    def a_task(self) -> int:
        answer = requests.get(f"{self._daemon.url}/api/v1/tasks?limit=1", timeout=30)
        tasks = answer.json()["data"]["tasks"] if answer.ok else []
        return tasks[0]["task_id"] if tasks else 1

    def look(self, label: str, answer: Answer | None) -> None:
        if answer:
            self._judge(label, answer)


def hang_up(channel: socket.socket) -> None:
    """Reset the connection."""
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


RAIDS: Mapping[str, Callable[[Raiders], None]] = {
    raid.__name__: raid
    for raid in (
        *(Raiders.half_open, Raiders.slow_body, Raiders.torn_body, Raiders.huge_body, Raiders.garbage, Raiders.corpus),
        *(Raiders.wrong_ranges, Raiders.torn_download, Raiders.torn_wait, Raiders.torn_stream, Raiders.flood),
    )
}
