"""What comes in with a request: path, query and body, read within the limits and validated by the handler's schemas."""

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from marshmallow import EXCLUDE, Schema, ValidationError, fields

from engine import awake
from engine.admission import UNKNOWN, BadRequest
from engine.api.answers import shortened
from engine.api.app_keys import BODY, CONFIG, DIGEST, HEAVY, PATH, QUERY, Handler
from engine.api.fields import File, first_fault
from engine.api.openapi import JSON_TYPE

FORM_TYPE = "multipart/form-data"
BROKEN_FORM = "The form is malformed or cut off; send it again, as curl -F does"
Body = tuple[dict[str, Any], "hashlib._Hash"]  # the values as they were sent, and a digest of them


@web.middleware
async def validation_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Validate path, query and body by the schemas of the handler, and leave the values in the request."""
    for described in getattr(request.match_info.handler, "__schemas__", ()):
        schema, location = described["schema"], described["location"]
        try:
            if location == "match_info":
                request[PATH] = validated(schema, request.match_info)
            elif location == "querystring":  # of a name that is given twice, the first value counts
                request[QUERY] = validated(schema, dict(reversed(list(request.query.items()))))
            else:
                request[BODY] = await _read_body(request, schema)
        except ValidationError as error:
            raise BadRequest(": ".join(first_fault(error))) from None
    return await handler(request)


def validated(schema: Schema, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the valid values without those that were null; names unknown to the schema are under UNKNOWN.

    Raises ValidationError.
    """
    checked = schema.load(values, unknown=EXCLUDE)
    known = {name: value for name, value in checked.items() if value is not None or name not in values}
    unknown = [shortened(name) for name in values if name not in schema.fields]
    return {**known, UNKNOWN: unknown} if unknown else known


async def _read_body(request: web.Request, schema: Schema) -> dict[str, Any]:
    """The object that was sent, as JSON or as a form; request[DIGEST] identifies it.

    Raises BadRequest or ValidationError; a body that is too large raises 413.
    """
    read = {JSON_TYPE: _read_json, FORM_TYPE: _read_form}.get(request.content_type)
    if read is None:  # also keeps a web page from posting plain text across sites
        raise BadRequest(f"Content-Type: '{request.content_type}' must be {JSON_TYPE} or {FORM_TYPE}")
    if (request.content_length or 0) > request.client_max_size:
        raise web.HTTPRequestEntityTooLarge(request.client_max_size)
    try:
        async with awake.timeout(request.app[CONFIG].body_timeout_s):
            body = await read(request, schema)
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="The body did not arrive within body_timeout_s seconds") from None

    def checked() -> tuple[dict[str, Any], str]:
        values, digest = body()
        return validated(schema, values), digest.hexdigest()

    async with request.app[HEAVY]:
        valid, request[DIGEST] = await asyncio.to_thread(checked)
    return valid


async def _read_json(request: web.Request, _: Schema) -> Callable[[], Body]:
    """Return a function that parses the bytes that came; it blocks."""
    raw = await request.read()
    return lambda: (parsed(raw), hashlib.sha256(raw))


async def _read_form(request: web.Request, schema: Schema) -> Callable[[], Body]:
    """Likewise for a form: files as they are, repeated where the field is a list, and every other value as in JSON."""
    try:
        received = await request.post()
    except (ValueError, AssertionError, HttpProcessingError):
        raise BadRequest(BROKEN_FORM) from None
    return lambda: _form_body(received.items(), schema)


def parsed(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`. Raises BadRequest."""
    try:
        body = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise BadRequest('The body is not valid JSON; send an object such as {"prompt": "a cat"}') from None
    if not isinstance(body, dict):
        raise BadRequest('The body must be a JSON object such as {"prompt": "a cat"}')
    return body


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(name)


def _form_body(received: Iterable[tuple[str, Any]], schema: Schema) -> Body:
    """The values of the parts. Raises BadRequest."""
    values: dict[str, Any] = {}
    digest = hashlib.sha256()  # of the parts: the boundary between them differs each time
    for name, sent in received:
        data = sent.file.read() if isinstance(sent, web.FileField) else sent
        data = data.encode() if isinstance(data, str) else bytes(data)
        digest.update(b"%d %s %d " % (len(name), name.encode(), len(data)))
        digest.update(data)
        field = schema.fields.get(name)
        try:
            value = _form_value(field, data)
        except ValueError:  # text that is no UTF-8
            raise BadRequest(BROKEN_FORM) from None
        values[name] = [*values.get(name, []), value] if isinstance(field, fields.List) else value
    return values, digest


def _form_value(field: fields.Field[Any] | None, data: bytes) -> Any:
    """A part of a form as JSON would have carried it: text stays text, 5 and true are what they look like."""
    inner = field.inner if isinstance(field, fields.List) else field
    if isinstance(inner, File):
        return data
    text = data.decode()
    if not isinstance(inner, fields.String):
        with suppress(ValueError):
            return json.loads(text, parse_constant=_refuse_constant)
    return text
