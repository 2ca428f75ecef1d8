"""Errors in HTTP: which status an exception of the engine becomes, and the one sentence that the client reads."""

import logging
from collections.abc import Mapping

from aiohttp import hdrs, web

from engine.admission import BadRequest
from engine.api.answers import brief
from engine.api.app_keys import API, CONFIG, REQUEST_ID, Handler
from engine.catalog.download import NoDownload
from engine.catalog.models import UnknownModel
from engine.files.media import NoPreview
from engine.files.place import NoStorage
from engine.queue.journal import JournalFault, KeyReused
from engine.queue.queue import Unavailable
from engine.queue.tasks import NoSuchTask, WrongState

log = logging.getLogger("wangpd")
RETRY_AFTER_S = 10

STATUSES: Mapping[type[Exception], type[web.HTTPException]] = {
    **dict.fromkeys((BadRequest, WrongState, NoDownload, NoPreview, KeyReused), web.HTTPBadRequest),
    **dict.fromkeys((UnknownModel, NoSuchTask), web.HTTPNotFound),
    **dict.fromkeys((JournalFault, NoStorage, Unavailable), web.HTTPServiceUnavailable),
}
KEPT_HEADERS = (hdrs.ALLOW, hdrs.CONTENT_RANGE, hdrs.RETRY_AFTER, hdrs.WWW_AUTHENTICATE)


@web.middleware
async def errors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error with `{"detail": one sentence}`; an unforeseen one is logged, and its cause is not sent."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return failure(request, error)
    except (web.RequestPayloadError, ConnectionError):  # a client that has gone hears nothing of it
        return failure(request, web.HTTPBadRequest(text="The body is cut off, or not encoded as its headers say"))
    except tuple(STATUSES) as error:
        return failure(request, STATUSES[type(error)](text=str(error)))
    except Exception:
        log.exception("request %s: %s %s", request[REQUEST_ID], request.method, request.rel_url.raw_path)
        return web.json_response({"detail": "Internal server error"}, status=500)


def failure(request: web.Request, error: web.HTTPException) -> web.Response:
    """Return the error as JSON, with those of its headers that mean something."""
    headers = {name: error.headers[name] for name in KEPT_HEADERS if name in error.headers}
    if error.status == web.HTTPServiceUnavailable.status_code:
        headers[hdrs.RETRY_AFTER] = str(RETRY_AFTER_S)
    sentence = error.text
    if sentence == f"404: {error.reason}":
        sentence = f"There is no {request.path}; GET {API}/ lists what there is"
    elif error.status == 405:
        sentence = f"{request.method} is not allowed here; allowed: {error.headers.get(hdrs.ALLOW, '')}"
    elif error.status == 413:
        sentence = f"The body is larger than {request.app[CONFIG].max_body_mb} MiB (max_body_mb)"
    return web.json_response({"detail": brief(sentence or error.reason)}, status=error.status, headers=headers)
