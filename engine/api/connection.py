"""A client's connection, below HTTP: the limit on how many there are, and JSON for what aiohttp itself refuses.

Overrides three methods of aiohttp's RequestHandler; tests/test_limits.py fails where a release of aiohttp changes them.
"""

import asyncio
import json
import logging
import re
from contextlib import suppress
from typing import Any, cast

from aiohttp import web
from aiohttp.http import HttpVersion10, RawRequestMessage

from engine.api.app_keys import REFUSAL
from engine.api.errors import RETRY_AFTER_S, failure
from engine.log import Counted

log = logging.getLogger("wangpd")
NO_HTTP = "The request is not valid HTTP, or a line of its head is too long"
NO_VERSION = "HTTP/{0.major}.{0.minor} is not supported; send HTTP/1.1"
FILE_WITH_SLASH = re.compile(r"/(download|preview)/[^/]+/$")  # no name of a file, and stays 404
REFUSED_S = 2  # time for a client that is turned away to read why
TURNED_AWAY = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: {length}\r\n"
    "Retry-After: {retry_after_s}\r\nConnection: close\r\n\r\n{body}"
)


def screen_requests(server: web.Server) -> None:
    """Have every request changed before a middleware or the router sees it.

    Trailing and doubled slashes are taken out of its path. Of another version than HTTP/1, it has a REFUSAL.
    """
    make = server.request_factory

    def make_screened(message: RawRequestMessage, *rest: Any) -> web.BaseRequest:
        path, version = message.url.raw_path, message.version
        plain = re.sub("/{2,}", "/", path)
        if not FILE_WITH_SLASH.search(plain):
            plain = plain.rstrip("/") or "/"
        if plain != path:
            message = message._replace(url=message.url.with_path(plain, encoded=True, keep_query=True))
        if version.major == 1:
            return make(message, *rest)
        request = make(message._replace(version=HttpVersion10, should_close=True), *rest)
        request[REFUSAL] = web.HTTPBadRequest(text=NO_VERSION.format(version))  # the parser takes 0.9 and 2.0 as well
        return request

    server.request_factory = make_screened


class Connection(web.RequestHandler):
    """A connection with aiohttp's protocol, unless it is one too many; aiohttp's own refusals become JSON."""

    def __init__(self, server: web.Server, limit: int, refusals: Counted, **options: Any) -> None:
        super().__init__(server, **options)
        self._server, self._limit, self._refusals = server, limit, refusals

    @property
    def peername(self) -> Any:
        """The client's address: "unix" over a Unix socket, whose clients name themselves; IPv4 as such on `::` too."""
        name = self.transport and self.transport.get_extra_info("peername")
        if isinstance(name, str | bytes):
            return ("unix",)
        return name and (name[0].removeprefix("::ffff:"), *name[1:])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, or answer 503 without reading its request."""
        if len(self._server.connections) < self._limit:
            super().connection_made(transport)
            return
        self._refusals.happened(f"connection refused: {self._limit} are open (max_connections)")
        refused = cast(asyncio.Transport, transport)
        refused.set_protocol(asyncio.Protocol())
        body = json.dumps({"detail": f"Too many connections: {self._limit} are open (max_connections)"})
        refused.write(TURNED_AWAY.format(length=len(body), retry_after_s=RETRY_AFTER_S, body=body).encode())
        # Half closed: closing with the request unread would reset the connection before the client reads the answer.
        with suppress(OSError):  # it may have gone already
            refused.write_eof()
        asyncio.get_running_loop().call_later(REFUSED_S, refused.abort)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer what no middleware sees, mostly broken HTTP. Raises ConnectionError where an answer has begun."""
        log.log(logging.DEBUG if status < 500 else logging.ERROR, "connection from %s", request.remote, exc_info=exc)
        if request.writer.output_size:
            raise ConnectionError("an answer has begun")
        response = web.json_response({"detail": NO_HTTP if status < 500 else "Internal server error"}, status=status)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer; one raised before any middleware, such as a wrong Expect, becomes JSON like the others."""
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            resp = failure(cast(web.Request, request), resp)
        return await super().finish_response(request, resp, start_time)
