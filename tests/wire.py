"""HTTP over a bare socket: requests that no client library would send, and answers as they come."""

import http.client
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 30  # far above any answer, so that it only ends a hang


@dataclass(frozen=True)
class Answer:
    """What came back; the names in `headers` have no case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def connected(url: str, source: str = "127.0.0.1") -> socket.socket:
    """A connection to the server at `url`, made from the address `source`; every wait on it has an end."""
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), PATIENCE_S, (source, 0))


def answered(channel: socket.socket, method: str = "GET") -> Answer | None:
    """The next answer, or None if the server closed the connection instead. Raises TimeoutError."""
    response = http.client.HTTPResponse(channel, method=method)
    try:
        response.begin()
        return Answer(response.status, response.headers, response.read())
    except (http.client.RemoteDisconnected, ConnectionError):
        return None


def exchange(url: str, request: bytes, source: str = "127.0.0.1") -> Answer | None:
    """Send `request` on a connection of its own, and tell what came back."""
    with connected(url, source) as channel:
        with suppress(ConnectionError):  # it answered before it had read all, and may still be heard
            channel.sendall(request)
        return answered(channel, request.split(b" ", 1)[0].decode("latin-1"))


def head(path: str, method: str = "GET", **headers: Any) -> bytes:
    """A request without a body; `_` in the name of a header stands for `-`."""
    fields = {"Host": "127.0.0.1", **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
