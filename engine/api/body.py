"""What comes in with a request: path, query and body, read within the limits and validated by the handler's schemas."""

import asyncio
import hashlib
import json
import mmap
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from aiohttp import hdrs, web
from marshmallow import EXCLUDE, Schema, ValidationError, fields
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser, parse_options_header

from engine import awake, hints
from engine.admission import UNKNOWN, BadRequest
from engine.api.answers import shortened
from engine.api.app_keys import BODY, CLIENT, CONFIG, DIGEST, INPUT_FILES, PATH, QUERY, SPOOL, TURNS, Handler
from engine.api.fields import CHUNK_BYTES, File, decoded, first_fault
from engine.api.json_text import CHARSET, LONG_BYTES, PLAIN_BYTES, TOO_LARGE, cut, parsed
from engine.api.lenient import meant
from engine.api.openapi import FORM_TYPE, JSON_TYPE
from engine.files.inputs import Receive, Sent
from engine.files.spool import SMALL_BYTES, BodyFile

# None of them can come from a web page of another site without the browser asking first.
JSON_TYPES = re.compile(r"(application|text)/json|application/[\w.-]+\+json")
MOST_PARTS = 100
FORM_LIMITS = {"max_segment_count": MOST_PARTS, "max_header_size": 2048, "max_header_count": 5}
BROKEN_FORM = "The form is malformed or cut off; send it again, as curl -F does"
NO_TEXT = "A part of the form is not UTF-8; send text as UTF-8 or with its charset, and a file with a file name"
Values = tuple[dict[str, Any], "hashlib._Hash"]  # as they were sent, and a digest of them


@web.middleware
async def validation_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Validate path, query and body by the schemas of the handler, and leave the values in the request."""
    described = {each["location"]: each["schema"] for each in getattr(request.match_info.handler, "__schemas__", ())}
    if schema := described.pop("match_info", None):
        request[PATH] = validated(schema, request.match_info)
    if schema := described.pop("querystring", None):  # of a name that is given twice, the first value counts
        request[QUERY] = validated(schema, dict(reversed(list(request.query.items()))))
    for schema in described.values():
        async with request.app[INPUT_FILES].receiving() as receive:
            request[BODY] = await _read_body(request, schema, receive)
            return await handler(request)
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


async def _read_body(request: web.Request, schema: Schema, receive: Receive) -> dict[str, Any]:
    """The object that was sent, as JSON or as a form; request[DIGEST] identifies it.

    Raises BadRequest or NoStorage; a body that is too large raises 413.
    """
    encodings = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ()))
    if set(re.split(r"[, ]+", encodings.lower())) - {"", "identity"}:
        rule = "is not supported; send the body as it is"
        raise web.HTTPUnsupportedMediaType(text=f"Content-Encoding: '{shortened(encodings)}' {rule}")
    read = _form_values if request.content_type == FORM_TYPE else _json_values
    if read is _json_values and not JSON_TYPES.fullmatch(request.content_type):
        raise BadRequest(f"Content-Type: '{request.content_type}' must be {JSON_TYPE} or {FORM_TYPE}")
    if (request.content_length or 0) > request.client_max_size:
        raise web.HTTPRequestEntityTooLarge(request.client_max_size)
    app, client = request.app, request[CLIENT]
    async with AsyncExitStack() as held:
        try:
            async with awake.timeout(app[CONFIG].body_timeout_s):
                body = await held.enter_async_context(app[SPOOL].body(client, _chunks(request)))
        except TimeoutError:
            raise web.HTTPRequestTimeout(text="The body did not arrive within body_timeout_s seconds") from None
        if body.tell() > SMALL_BYTES:
            await held.enter_async_context(app[TURNS].turn(client))
        valid, request[DIGEST] = await asyncio.to_thread(_checked, read, request, body, schema, receive)
    return valid


async def _chunks(request: web.Request) -> AsyncIterator[bytes]:
    """What arrives of the body. Raises 413."""
    size_bytes = 0
    async for chunk in request.content.iter_any():
        size_bytes += len(chunk)
        if size_bytes > request.client_max_size:
            raise web.HTTPRequestEntityTooLarge(request.client_max_size)
        yield chunk


def _checked(
    read: Callable[..., Values], request: web.Request, body: BodyFile, schema: Schema, receive: Receive
) -> tuple[dict[str, Any], str]:
    """The valid values of a body that has arrived, its files received, and its digest. Raises BadRequest, NoStorage."""
    values, digest = read(request, body, schema, receive)
    valid = validated(schema, values)
    for name in (name for name in valid if _is_file(schema, name)):
        if isinstance(files := valid[name], list):
            valid[name] = [_received(f"{name}[{place}]", file, receive) for place, file in enumerate(files)]
        else:
            valid[name] = _received(name, files, receive)
    return valid, digest.hexdigest()


def _received(name: str, file: str | bytes | Sent, receive: Receive) -> Sent:
    """The file that a text in base64 holds, unless it was received before. Raises BadRequest, NoStorage."""
    if isinstance(file, Sent):
        return file
    try:
        # `decoded` resolves JSON's escapes, so a text that was parsed already gets them back.
        return receive(decoded(json.dumps(file)[1:-1].encode() if isinstance(file, str) else file))
    except ValueError:
        raise BadRequest(f"{name}: is not valid base64; send the file's bytes in base64") from None


def _is_file(schema: Schema, name: str) -> bool:
    field = schema.fields.get(name)
    return isinstance(field.inner if isinstance(field, fields.List) else field, File)


def _json_values(request: web.Request, body: BodyFile, schema: Schema, _: Receive) -> Values:
    """The object that was sent as JSON; a large file in it is bytes."""
    size_bytes = body.tell()
    body.seek(0)
    digest = hashlib.file_digest(body, "sha256")
    if size_bytes <= PLAIN_BYTES:
        body.seek(0)
        return parsed(body.read(), request.charset), digest
    with mmap.mmap(body.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        text, long_texts = cut(mapped)
    values = parsed(text, request.charset)

    def whole(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in long_texts:
            return value
        text = long_texts[value]
        return text if _is_file(schema, name) else text[:LONG_BYTES].decode(errors="replace")  # too long by any rule

    for name, value in values.items():
        values[name] = [whole(name, item) for item in value] if isinstance(value, list) else whole(name, value)
    return values, digest


def _form_values(request: web.Request, body: BodyFile, schema: Schema, receive: Receive) -> Values:
    """The values of a form: files as they were received, repeated where the field is a list, all others as in JSON."""
    values: dict[str, Any] = {}
    digest, plain_bytes = hashlib.sha256(), 0  # of the parts: the boundary between them differs each time
    body.seek(0)
    try:
        boundary = parse_options_header(request.headers[hdrs.CONTENT_TYPE])[1].get("boundary", "")
        parser = PushMultipartParser(boundary, **FORM_LIMITS)
        events = parser.parse_blocking(body.read, CHUNK_BYTES)
        for part in events:  # each begins with its head
            assert isinstance(part, MultipartSegment)
            value = _part_value(part, iter(partial(next, events), None), schema, receive)
            digest.update(ascii((part.name, value.sha256 if isinstance(value, Sent) else value)).encode())
            plain_bytes += part.size if value and isinstance(value, str) else 0
            if plain_bytes > PLAIN_BYTES:
                raise BadRequest(TOO_LARGE)
            if isinstance(schema.fields.get(part.name), fields.List):
                values.setdefault(part.name, []).append(value)
            else:
                values[part.name] = value
    except ParserLimitReached:
        raise BadRequest(f"The form has more than {MOST_PARTS} parts, or a part with very long headers") from None
    except (MultipartError, UnicodeEncodeError):  # a boundary that is no text
        raise BadRequest(BROKEN_FORM) from None
    return values, digest


def _part_value(
    part: MultipartSegment, chunks: Iterable[bytes], schema: Schema, receive: Receive
) -> Sent | str | bytes:
    """The value of a part, whose chunks are all read; bytes if there is no such field. Raises BadRequest, NoStorage."""
    name = part.name
    if not name:
        raise BadRequest(BROKEN_FORM)
    if _is_file(schema, name):
        unnamed = part.filename is None and "filename*=" not in part["Content-Disposition"]
        is_text = unnamed and (part.content_type or "text/plain").startswith("text/")
        is_text |= part.header("Content-Transfer-Encoding", "").strip().lower() == "base64"
        sent = _received(name, b"".join(chunks), receive) if is_text else receive(chunks)
        return sent if sent.size_bytes or part.filename else ""  # a file input without a file
    text = b""
    for chunk in chunks:
        text += chunk[: LONG_BYTES - len(text)]
    if name not in schema.fields:
        return text
    try:
        if not CHARSET.fullmatch(charset := part.charset or "utf-8"):
            raise LookupError(charset)
        # What is cut is too long by any rule, and may have been cut within a character.
        return text.decode(charset, "strict" if part.size == len(text) else "replace")
    except UnicodeDecodeError:
        raise BadRequest(NO_TEXT) from None
    except LookupError:
        raise BadRequest(BROKEN_FORM) from None
