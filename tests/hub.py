"""A small Hugging Face hub on localhost: enough for the hub's own client to list a repository and fetch its files."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LISTING = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>.+)")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
PIECE_BYTES = 2**16


class Hub:
    """Repositories by name, each file by its path. What goes wrong is set by the attributes."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.claimed_bytes: dict[str, int] = {}  # of a file, in place of its own size
        self.refused: dict[str, tuple[int, str]] = {}  # repository → status and X-Error-Code
        self.breaks_after: list[int] = []  # bytes after which each of the next answers of a file breaks off
        self.spoiled: set[str] = set()  # files that arrive with another content
        self.revisions: list[str] = []  # that were asked for
        self.tokens: set[str | None] = set()  # that came with the requests
        self.fetched: list[tuple[str, int]] = []  # name of each file, and the byte from which it was wanted
        self.held_after: int | None = None  # bytes after which an answer waits for `go_on`
        self.holding, self.go_on = threading.Event(), threading.Event()
        self.endpoint = ""

    def reset(self) -> None:
        """Forget everything but the address."""
        self.go_on.set()
        endpoint = self.endpoint
        self.__init__()  # type: ignore[misc]  # the same state as of a new one
        self.endpoint = endpoint

    def names(self) -> list[str]:
        """The files that were fetched."""
        return [name for name, _ in self.fetched]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that listens, at `hub.endpoint`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """A listing, or a file from the byte that is wanted."""
        path = unquote(urlsplit(self.path).path)
        self.hub.tokens.add(self.headers.get("Authorization"))
        if found := LISTING.fullmatch(path):
            self.hub.revisions.append(found["revision"])
            self._known(found["repo"], lambda files: self._list(found["repo"], files))
        elif found := FILE.fullmatch(path):
            self._known(found["repo"], lambda files: self._file(found["name"], files[found["name"]]))

    def _known(self, repo: str, answer: Any) -> None:
        status, code = self.hub.refused.get(repo, (404, "RepoNotFound"))
        if repo in self.hub.refused or repo not in self.hub.repos:
            self._answer(status, b"{}", {"X-Error-Code": code})
        else:
            answer(self.hub.repos[repo])

    def _list(self, repo: str, files: Mapping[str, bytes]) -> None:
        siblings = [self._entry(name, data) for name, data in files.items()]
        self._answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        size = self.hub.claimed_bytes.get(name, len(data))
        entry = {"rfilename": name, "size": size, "blobId": hashlib.sha1(data, usedforsecurity=False).hexdigest()}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"size": size, "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 100}
        return entry

    def _file(self, name: str, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        self.hub.fetched.append((name, start))
        if name in self.hub.spoiled:
            data = bytes(len(data))
        rest = data[start:]
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {}
        self._answer(206 if wanted else 200, rest, headers)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self._send(body)

    def _send(self, body: bytes) -> None:
        end = self.hub.breaks_after.pop(0) if self.hub.breaks_after and len(body) > PIECE_BYTES else len(body)
        try:
            for start in range(0, end, PIECE_BYTES):
                self._hold(start)
                self.wfile.write(body[start : min(end, start + PIECE_BYTES)])
        except OSError:  # who asked has gone
            end = -1
        self.close_connection = end < len(body)

    def _hold(self, sent: int) -> None:
        if self.hub.held_after is not None and sent >= self.hub.held_after:
            self.wfile.flush()
            self.hub.holding.set()
            self.hub.go_on.wait()

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests ask `fetched`."""
