"""A client's connection, below HTTP: how many there may be, when one ends, and JSON for what aiohttp itself refuses.

Overrides methods of aiohttp's RequestHandler; tests/test_limits.py fails where a release of aiohttp changes them.
"""

import asyncio
import json
import logging
import re
import socket
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from operator import itemgetter
from typing import Any, cast

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion10, RawRequestMessage

from engine.api.app_keys import ENDS_WITH_CLIENT, REFUSAL
from engine.api.errors import RETRY_AFTER_S, failure
from engine.api.guard import OPEN_PATHS, OWN_HEADERS, AccessLog
from engine.log import Counted

log = logging.getLogger("wangpd")
NO_HTTP = "The request is not valid HTTP, or a line of its head is too long"
NO_VERSION = "HTTP/{0.major}.{0.minor} is not supported; send HTTP/1.1"
NO_SLOT = "Too many connections: {}"
FILE_WITH_SLASH = re.compile(r"/(download|preview)/[^/]+/$")  # no name of a file, and stays 404
KEEPALIVE_S = 75  # longer than proxies keep a connection, short enough to end one that never sends its headers
STALLED_MS = 60_000  # without progress in what is sent, the kernel ends the connection
LEAST_SHARE = 8
RESERVE, RESERVE_SHARE = 32, 8  # connections beyond the limit that may ask for /health; of them from one address
RESERVE_S = 2  # in which such a connection must send its request


class Slots:
    """Which connections may be open: `limit` in all, half of them from one address, and a reserve for /health.

    An address that is `exempt` may have all of them, like clients of a Unix socket. If there is no slot left, another
    one that has more than LEAST_SHARE gives its oldest connection up for a client that has fewer.
    """

    def __init__(self, limit: int, exempt: Collection[str]) -> None:
        self._limit, self._exempt = limit, {*exempt, "unix"}
        self._share = limit // 2 if limit >= 2 * LEAST_SHARE else limit
        self._open: dict[Connection, str] = {}  # with their addresses
        self._reserve: dict[Connection, str] = {}  # the oldest first
        self._refusals = Counted(log)

    def take(self, connection: "Connection", address: str) -> None:
        """Give the connection a slot, or one of the reserve: then its `lack` says why.

        In a full reserve, the oldest connection of the address, or of all, is turned away for it.
        """
        exempt = address in self._exempt
        if len(self._open) >= self._limit:
            self._make_room(0 if exempt else list(self._open.values()).count(address))
        if len(self._open) >= self._limit:
            connection.lack = f"{self._limit} are open (max_connections)"
        elif not exempt and list(self._open.values()).count(address) >= self._share:
            connection.lack = f"{self._share} are open from {address} (half of max_connections)"
        else:
            self._open[connection] = address
            return
        self._refusals.happened(f"connection refused: {connection.lack}")
        own = [other for other, held_by in self._reserve.items() if held_by == address]
        if not exempt and len(own) >= RESERVE_SHARE:
            own[0].turn_away()
        elif len(self._reserve) >= RESERVE:
            next(iter(self._reserve)).turn_away()
        self._reserve[connection] = address

    def _make_room(self, held: int) -> None:
        """End the oldest connection of the address that has the most, if that is above `held` and LEAST_SHARE."""
        counts = Counter(address for address in self._open.values() if address not in self._exempt)
        heaviest, most = max(counts.items(), key=itemgetter(1), default=("", 0))
        if most > max(LEAST_SHARE, held + 1):
            oldest = next(connection for connection, address in self._open.items() if address == heaviest)
            self.free(oldest)
            with suppress(OSError, AttributeError):  # it has gone just now
                # Not `abort`: that closes the socket under a sendfile, whose entry in the selector stays behind.
                cast(asyncio.Transport, oldest.transport).get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def free(self, connection: "Connection") -> None:
        """Take the connection's slot back, if it has one."""
        self._open.pop(connection, None)
        self._reserve.pop(connection, None)


class Connection(web.RequestHandler):
    """A connection with aiohttp's protocol, if it gets a slot; aiohttp's own refusals become JSON."""

    def __init__(self, server: web.Server, slots: Slots) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEPALIVE_S,
            access_log_class=AccessLog,
            access_log=logging.getLogger("wangpd.access"),
            auto_decompress=False,  # an encoded body is refused, so nothing may inflate it
        )
        self._slots, self._make_request = slots, server.request_factory
        self._request_factory = self._screened
        self.lack = ""  # why it is in the reserve
        self._expiry: asyncio.TimerHandle | None = None

    def _screened(self, message: RawRequestMessage, *rest: Any) -> web.BaseRequest:
        """The request before a middleware or the router sees it: trailing and doubled slashes are out of its path.

        It has a REFUSAL if its version is not HTTP/1, and on a connection of the reserve if it is not for /health.
        """
        path, version = message.url.raw_path, message.version
        refusal: web.HTTPException | None = None
        plain = re.sub("/{2,}", "/", path)
        if not FILE_WITH_SLASH.search(plain):
            plain = plain.rstrip("/") or "/"
        if plain != path:
            message = message._replace(url=message.url.with_path(plain, encoded=True, keep_query=True))
        if self.lack:
            message = message._replace(should_close=True)
            if plain not in OPEN_PATHS:
                refusal = web.HTTPServiceUnavailable(text=NO_SLOT.format(self.lack))
        if version.major != 1:  # the parser takes 0.9 and 2.0 as well
            message = message._replace(version=HttpVersion10, should_close=True)
            refusal = web.HTTPBadRequest(text=NO_VERSION.format(version))
        request = self._make_request(message, *rest)
        if refusal:
            request[REFUSAL] = refusal
        return request

    @property
    def peername(self) -> Any:
        """The client's address: "unix" over a Unix socket, whose clients name themselves; IPv4 as such on `::` too."""
        name = self.transport and self.transport.get_extra_info("peername")
        if isinstance(name, str | bytes):
            return ("unix",)
        return name and (name[0].removeprefix("::ffff:"), *name[1:])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection; one that gets no slot can ask for /health only, and within RESERVE_S."""
        super().connection_made(transport)
        with suppress(OSError, AttributeError):  # a Unix socket, or a system that is not Linux
            channel = transport.get_extra_info("socket")
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
        address, *_ = self.peername or ("-",)  # it may have gone already
        self._slots.take(self, address)
        if self.lack:
            self._expiry = self._loop.call_later(RESERVE_S, self.turn_away)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Give the slot back once no handler runs for it; one that changes nothing is cancelled."""
        task, request = self._task_handler, self._current_request
        super().connection_lost(exc)
        if self._expiry:
            self._expiry.cancel()
        if task is None:
            self._slots.free(self)
            return
        task.add_done_callback(lambda _: self._slots.free(self))
        if self.lack or (request and ENDS_WITH_CLIENT in request):
            task.cancel()

    def turn_away(self) -> None:
        """End a connection of the reserve, with 503 unless it has been answered."""
        self._slots.free(self)  # now: others may take its place before its task has ended
        if self.transport is None:
            return
        if self._keepalive:  # not answered
            body = json.dumps({"detail": NO_SLOT.format(self.lack)})
            kind = {hdrs.CONTENT_TYPE: "application/json; charset=utf-8", hdrs.CONTENT_LENGTH: len(body)}
            headers = kind | {hdrs.RETRY_AFTER: RETRY_AFTER_S, hdrs.CONNECTION: "close"} | OWN_HEADERS
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self.transport.write(f"HTTP/1.1 503 Service Unavailable\r\n{lines}\r\n{body}".encode())
        self.transport.abort()  # what the kernel has taken is sent; a client that takes nothing must not be waited for

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
        if not resp.prepared:  # add_headers does not see what was refused before it had a route
            resp.headers.update(OWN_HEADERS)
        return await super().finish_response(request, resp, start_time)
