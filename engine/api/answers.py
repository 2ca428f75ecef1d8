"""The form of every answer: the contract's envelope, times, links and shortened texts."""

import json
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

from aiohttp import hdrs, web

from engine.api.app_keys import API, CONFIG

MAX_LISTED_CHARS = 100  # of a prompt or name in a listing or a sentence
MAX_SENTENCE_CHARS = 2000
MOST_CHARS = 2**18  # of an answer in memory, but for an entry
FIRST_S, LAST_S = -62_135_596_800, 253_402_300_799  # the first and last second that `datetime` knows
STRICT_JSON = partial(json.dumps, allow_nan=False)  # raises ValueError for NaN and Infinity, which no JSON parser reads


def answered(message: str, data: Mapping[str, Any], **options: Any) -> web.Response:
    """Return the contract's envelope around `data`."""
    return web.json_response({"success": True, "message": message, "data": data}, dumps=STRICT_JSON, **options)


async def listed(
    request: web.Request, message: str, data: Mapping[str, Any], entries: AsyncIterator[Any]
) -> web.StreamResponse:
    """Return the envelope around `data`, whose empty list gets `entries`; a long one is sent as they come."""
    text, _, tail = STRICT_JSON({"success": True, "message": message, "data": data}).partition("]")
    response, comma = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "application/json; charset=utf-8"}), ""
    try:
        async for entry in entries:
            text, comma = f"{text}{comma}{STRICT_JSON(entry)}", ", "
            if len(text) > MOST_CHARS:
                if not response.prepared:
                    await response.prepare(request)
                    if request.method == hdrs.METH_HEAD:
                        return response
                await response.write(text.encode())
                text = ""
        if not response.prepared:
            return web.json_response(text=f"{text}]{tail}")
        await response.write(f"{text}]{tail}".encode())
    except BaseException:
        if response.prepared and request.transport:  # no other answer may follow in the middle of this one
            request.transport.abort()
        raise
    return response


def iso(seconds: float | None) -> str | None:
    """Return seconds since the epoch as UTC, ISO 8601 with milliseconds and Z, within the years 1 to 9999."""
    if seconds is None:
        return None
    seconds = min(max(seconds, FIRST_S), LAST_S)  # a file's time may be any
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def link(app: web.Application, path: str) -> str:
    """Return the path of an API resource as a client sees it, behind a proxy too."""
    return f"{app[CONFIG].base_path}{API}{path}"


def shortened(text: str) -> str:
    """Return `text`, cut to what a listing shows."""
    return text if len(text) <= MAX_LISTED_CHARS else text[:MAX_LISTED_CHARS] + "…"


def brief(sentence: str) -> str:
    """Return the sentence without the middle of a value that is too long to repeat; the rule is at the end."""
    half = MAX_SENTENCE_CHARS // 2
    return sentence if len(sentence) <= MAX_SENTENCE_CHARS else f"{sentence[:half]}…{sentence[-half:]}"
