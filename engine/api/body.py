"""What comes in with a request: path, query and body, read within the limits and validated by the handler's schemas."""

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from marshmallow import EXCLUDE, Schema, ValidationError, fields

from engine import awake, hints
from engine.admission import UNKNOWN, BadRequest
from engine.api.answers import shortened
from engine.api.app_keys import BODY, CONFIG, DIGEST, HEAVY, PATH, QUERY, Handler
from engine.api.fields import File, first_fault
from engine.api.json_text import parsed
from engine.api.lenient import meant
from engine.api.openapi import FORM_TYPE, JSON_TYPE

# None of them can come from a web page of another site without the browser asking first.
JSON_TYPES = re.compile(r"(application|text)/json|application/[\w.-]+\+json")
BROKEN_FORM = "The form is malformed or cut off; send it again, as curl -F does"
NO_TEXT = "A part of the form is not UTF-8; send text as UTF-8 or with its charset, and a file with a file name"
Body = tuple[dict[str, Any], "hashlib._Hash"]  # the values as they were sent, and a digest of them


@web.middleware
async def validation_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Validate path, query and body by the schemas of the handler, and leave the values in the request."""
    for described in getattr(request.match_info.handler, "__schemas__", ()):
        schema, location = described["schema"], described["location"]
        if location == "match_info":
            request[PATH] = validated(schema, request.match_info)
        elif location == "querystring":  # of a name that is given twice, the first value counts
            request[QUERY] = validated(schema, dict(reversed(list(request.query.items()))))
        else:
            request[BODY] = await _read_body(request, schema)
    return await handler(request)


def validated(schema: Schema, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the valid values without those that count as left out; names unknown to the schema are under UNKNOWN.

    Raises BadRequest.
    """
    understood = {name: meant(field, values[name]) for name, field in schema.fields.items() if name in values}
    read = {name: value for name, value in understood.items() if value is not None}
    read |= {name: values[name] for name in understood.keys() - read if schema.fields[name].required}
    unknown = [shortened(name) for name in values if name not in schema.fields]
    try:
        known = dict(schema.load(read, unknown=EXCLUDE))
    except ValidationError as error:
        wrong, sentence = first_fault(error)
        near = [name for name in unknown[: hints.MOST_NAMED] if wrong not in read and hints.meaning_of(name) == wrong]
        rule = f"is missing; there is no field '{near[0]}', send it as {wrong}" if near else sentence
        raise BadRequest(f"{wrong}: {rule}") from None
    return {**known, UNKNOWN: unknown} if unknown else known


async def _read_body(request: web.Request, schema: Schema) -> dict[str, Any]:
    """The object that was sent, as JSON or as a form; request[DIGEST] identifies it.

    Raises BadRequest; a body that is too large raises 413.
    """
    encodings = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ()))
    if set(re.split(r"[, ]+", encodings.lower())) - {"", "identity"}:
        rule = "is not supported; send the body as it is"
        raise web.HTTPUnsupportedMediaType(text=f"Content-Encoding: '{shortened(encodings)}' {rule}")
    read = _read_form if request.content_type == FORM_TYPE else _read_json
    if read is _read_json and not JSON_TYPES.fullmatch(request.content_type):
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
    raw, charset = await request.read(), request.charset
    return lambda: (parsed(raw, charset), hashlib.sha256(raw))


async def _read_form(request: web.Request, schema: Schema) -> Callable[[], Body]:
    """Likewise for a form: files as they are, repeated where the field is a list, and every other value as in JSON."""
    try:
        received = await request.post()
    except UnicodeDecodeError:
        raise BadRequest(NO_TEXT) from None
    except (ValueError, LookupError, AssertionError, HttpProcessingError):  # LookupError: a charset that is none
        raise BadRequest(BROKEN_FORM) from None
    return lambda: _form_body(received.items(), schema)


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
        inner = field.inner if isinstance(field, fields.List) else field
        # A file input without a file is an empty text.
        is_file = isinstance(inner, File) and (isinstance(sent, web.FileField) or (data and not isinstance(sent, str)))
        try:
            value = data if is_file or not field else data.decode()
        except UnicodeDecodeError:
            raise BadRequest(NO_TEXT) from None
        if inner is not field:
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    return values, digest
