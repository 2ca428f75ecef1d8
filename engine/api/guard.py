"""Who may ask: request ids, host names, web pages of other sites, and the token; and what every answer carries.

Why not the libraries: aiohttp-cors 0.8 sends no `Vary: Origin` and nothing on an answer that has no route (404), and
aiohttp-remotes 1.4 answers 400 to a forwarded address that it can't parse, where the client's own answer is due.
"""

import hmac
import logging
import re
import socket
import uuid
from contextlib import suppress
from functools import cache
from ipaddress import ip_address

from aiohttp import hdrs, web
from aiohttp.abc import AbstractAccessLogger

from engine.api.answers import shortened
from engine.api.app_keys import API, CLIENT, CONFIG, REFUSAL, REQUEST_ID, TOKEN, Handler
from engine.log import Counted

SAFE_METHODS = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
OPEN_PATHS = frozenset({f"{API}/health", f"{API}/health/ready"})  # monitors read them without the token
CORS_HEADERS = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, HEAD, POST, PATCH, DELETE",
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "Authorization, Content-Type, Idempotency-Key, Range, X-Request-ID",
    hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: "Content-Range, ETag, Idempotency-Replayed, Retry-After, X-Request-ID",
    hdrs.ACCESS_CONTROL_MAX_AGE: "600",
}
SHARED_PATHS = (f"{API}/download/", f"{API}/preview/")  # what pages of `cors_origins` show
OWN_HEADERS = {
    hdrs.SERVER: "wangpd",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
PAGE_HEADERS = {  # of HTML
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " font-src 'self' data:; worker-src blob:; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
}


@web.middleware
async def request_id_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request an id, the client's own if it has one, so that its lines in the log can be found."""
    sent = request.headers.get("X-Request-ID", "")
    request[REQUEST_ID] = sent if re.fullmatch(r"[!-~]{1,128}", sent) else uuid.uuid4().hex
    request[CLIENT] = _forwarded(request, "X-Forwarded-For", request.remote or "-")
    return await handler(request)


@web.middleware
async def guard_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse a host name that is not allowed, a web page of another site, and a missing or wrong token."""
    if REFUSAL in request:
        raise request[REFUSAL]
    app = request.app
    # Not `request.host`, which asks the resolver where there is no such header, and waits for it.
    own = request.headers.get(hdrs.HOST, "")
    host = _forwarded(request, "X-Forwarded-Host", own)
    for name in (own, host) if app[CONFIG].allowed_hosts or _is_browser(request) else ():
        if not _is_allowed(app, _bare_name(name)):
            remedy = f"if it is one, add '{shortened(_bare_name(name))}' to allowed_hosts"
            raise web.HTTPForbidden(text=f"Host: '{shortened(name)}' is no name of this daemon; {remedy}")
    asked = hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    if request.method == hdrs.METH_OPTIONS and asked and _may_share(request):  # a browser asks before it sends
        return web.Response(status=204)  # add_headers says the rest
    if request.method not in SAFE_METHODS and _from_elsewhere(request, host):
        raise web.HTTPForbidden(text="Origin: a web page of another site asked; cors_origins names those that may")
    guarded = request.path.startswith(API) and request.path not in OPEN_PATHS  # the documentation holds no secrets
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    bearer = token.strip().encode(errors="surrogateescape") if scheme.lower() == "bearer" else b""
    if app[TOKEN] and guarded and not hmac.compare_digest(bearer, app[TOKEN]):
        sentence = "Authorization: 'Bearer TOKEN' is asked for here"
        raise web.HTTPUnauthorized(text=sentence, headers={hdrs.WWW_AUTHENTICATE: "Bearer"})
    return await handler(request)


def _forwarded(request: web.Request, header: str, own: str) -> str:
    """The header's last value if a trusted proxy sent it, else `own`."""
    if request.remote not in request.app[CONFIG].trusted_proxies:
        return own
    return request.headers.getall(header, [own])[-1].rsplit(",", 1)[-1].strip()


def _is_browser(request: web.Request) -> bool:
    """True if a browser may have sent it, over plain HTTP too, where it says no Sec-Fetch-Site."""
    headers = request.headers
    said = hdrs.ORIGIN in headers or hdrs.REFERER in headers or headers.get(hdrs.USER_AGENT, "").startswith("Mozilla/")
    return said or any(name.lower().startswith("sec-fetch-") for name in headers)


def _is_allowed(app: web.Application, name: str) -> bool:
    """True for an address, a name of this machine or below localhost, and what is allowed."""
    with suppress(ValueError):
        return bool(ip_address(name))
    known = name in own_names() or name in map(_bare_name, app[CONFIG].allowed_hosts)
    return known or name.endswith(".localhost")


@cache
def own_names() -> frozenset[str]:
    """Return the names that this machine has without a resolver."""
    name = socket.gethostname().lower()
    label = name.partition(".")[0]
    return frozenset({"localhost", name, label, f"{label}.local"} - {""})


def _from_elsewhere(request: web.Request, host: str) -> bool:
    """True if a browser says that a page of another site, and none of `cors_origins`, makes this request."""
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None:
        return request.headers.get("Sec-Fetch-Site") == "cross-site"
    return origin.partition("://")[2] != host and not _may_share(request)


def _bare_name(host: str) -> str:
    """The name or address in a Host header, without its port, as resolvers compare it."""
    name = re.sub(r":[0-9]*$", "", host) if "]" in host or host.count(":") == 1 else host
    return name.strip("[]").rstrip(".").lower()


def _may_share(request: web.Request) -> bool:
    """True if the page that asks is one of `cors_origins`."""
    allowed = request.app[CONFIG].cors_origins
    return request.headers.get(hdrs.ORIGIN) in allowed or (hdrs.ORIGIN in request.headers and "*" in allowed)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add what every answer carries. A signal and not a middleware, which does not see files being sent."""
    response.headers.update(OWN_HEADERS)
    response.headers["X-Request-ID"] = request.get(REQUEST_ID, "-")
    if response.content_type == "text/html":
        response.headers.update(PAGE_HEADERS)
    if request.app[CONFIG].cors_origins:  # on refusals too: a cache must not serve one origin's answer to another
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        if request.path.startswith(SHARED_PATHS):
            response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
    if _may_share(request):
        response.headers.update(CORS_HEADERS | {hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: request.headers[hdrs.ORIGIN]})


class AccessLog(AbstractAccessLogger):
    """One short line a request, at level debug unless it failed. Those that are to come again later are counted."""

    put_off = Counted(logging.getLogger("wangpd.access"))  # of all connections, each of which has an AccessLog

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        level = logging.INFO if response.status >= 500 and response.status != 503 else logging.DEBUG
        request_id = response.headers.get("X-Request-ID", "-")
        path = request.rel_url.raw_path  # still encoded: a line feed in it would forge a line of the log
        line = (request.get(CLIENT, request.remote), request.method, path, response.status, time * 1000, request_id)
        self.logger.log(level, "%s %s %s %d %.1f ms %s", *line)
        if response.status == 503:
            self.put_off.happened(f"answered 503 to {request.method} {path}")

    @property
    def enabled(self) -> bool:
        return self.logger.isEnabledFor(logging.INFO)
