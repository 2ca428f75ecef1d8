"""Honest clients in a process of their own: how long the daemon keeps them waiting while others attack it.

`python -m tests.honest URL PROXY_URL` asks directly and through the proxy, each from an address of its own, until its
standard input ends. It prints a Sample a line, as JSON. A process of its own, and the standard library alone: threads
that attack in the same process would be measured too.
"""

import base64
import contextlib
import http.client
import io
import itertools
import json
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

API = "/api/v1"
USER, PASSWORD = "alice", "secret"  # of the proxy
LOGIN = {"Authorization": "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}
ADDRESSES = {"direct": "127.0.0.100", "nginx": "127.0.0.101"}
PATIENCE_S = 60  # for one answer
# Seconds between two requests of a kind. The proxy takes ten a second from an address.
PAUSES: Mapping[str, Mapping[str, float]] = {
    "direct": {"health": 0.05, "dry run": 0.3, "submission": 0.3, "picture": 0.5},
    "nginx": {"health": 0.25, "dry run": 1.0, "submission": 1.0, "picture": 1.0},
}


class Sample(NamedTuple):
    """One request. Times by time.monotonic(), which all processes share; `status` is 0 where no answer came."""

    door: str
    errand: str
    began: float
    seconds: float
    status: int


class Client:
    """One errand through one door, again and again."""

    def __init__(self, door: str, url: str, errand: str) -> None:
        self._door, self._errand, self._address = door, errand, urlsplit(url)
        self._numbers = itertools.count()

    def run(self, over: threading.Event) -> None:
        """Until `over` is set."""
        while not over.wait(PAUSES[self._door][self._errand]):
            began = time.monotonic()
            status, body = self._ask(*self._request())
            sample = Sample(self._door, self._errand, began, time.monotonic() - began, status)
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.write(json.dumps(sample) + "\n")
                sys.stdout.flush()
            if status == 200 and b'"task_id": ' in body:
                task_id = json.loads(body)["data"]["task_id"]
                self._ask("DELETE", f"/queue/{task_id}", b"", {})

    def _request(self) -> tuple[str, str, bytes, dict[str, str]]:
        if self._errand == "health":
            return "GET", "/health", b"", {}
        if self._errand == "picture":
            form = b"".join(parts(next(self._numbers) + 1000 * (self._door == "nginx")))
            return "POST", "/generate", form, {"Content-Type": "multipart/form-data; boundary=x"}
        target = "/generate?dry_run=1" if self._errand == "dry run" else "/generate"
        return "POST", target, b'{"prompt": "a red circle"}', {"Content-Type": "application/json"}

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        source = (ADDRESSES[self._door], 0)
        connection = http.client.HTTPConnection(
            self._address.hostname or "", self._address.port, timeout=PATIENCE_S, source_address=source
        )
        try:
            connection.request(method, API + path, body or None, {**headers, **LOGIN, "Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()


def parts(number: int) -> Iterator[bytes]:
    """A form with a small picture that no other form has."""
    head = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n'
    yield head % (b"prompt", b"") + b"a red circle\r\n"
    yield head % (b"image_start", b'; filename="a.png"') + small_png(number) + b"\r\n--x--\r\n"


def small_png(number: int) -> bytes:
    """A PNG of 64x64 pixels; another one for each number."""
    rows = io.BytesIO()
    for row in range(64):
        rows.write(b"\0" + bytes([number % 256, number // 256 % 256, row]) * 64)
    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.getvalue())), (b"IEND", b""))
    )


def main(*urls: str) -> None:
    """Ask until the standard input ends."""
    over = threading.Event()
    clients = [Client(door, url, errand) for door, url in zip(PAUSES, urls, strict=True) for errand in PAUSES[door]]
    threads = [threading.Thread(target=client.run, args=(over,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join(5)


if __name__ == "__main__":
    main(*sys.argv[1:])
