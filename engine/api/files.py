"""Files in HTTP: which may be sent, byte ranges, conditions, and the headers of a download.

Not aiohttp's FileResponse: it answers 416 to a malformed Range and an empty 403 or 404 for a file that can't be opened,
and keeps the connection after a file that has shrunk.
"""

import asyncio
import errno
import math
import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple
from urllib.parse import quote

from aiohttp import hdrs, web

from engine import awake
from engine.api.answers import shortened
from engine.api.app_keys import API, CLIENT, CONFIG, OUTPUTS
from engine.files.outputs import Unreadable
from engine.turns import Turns

PREVIEWS_AT_ONCE: Final = 2
PREVIEW_S: Final = 30.0  # that a client waits for one


class Opened(NamedTuple):
    """A file that is open, and what was known of it then."""

    name: str
    file: BinaryIO
    size: int
    etag: str
    modified: int  # epoch seconds; HTTP wants no Last-Modified in the future

    @classmethod
    def of(cls, file: BufferedReader) -> "Opened":
        """Describe the very file that is open, whatever has its name meanwhile."""
        about = os.fstat(file.fileno())
        modified = int(max(0, min(math.ceil(about.st_mtime), time.time())))
        etag = f'"{about.st_mtime_ns:x}-{about.st_size:x}"'
        return cls(Path(file.name).name, file, about.st_size, etag, modified)


class PreviewPool:
    """The threads that make previews: a slow one takes none that submissions and downloads need."""

    def __init__(self) -> None:
        self._threads, self._turns = ThreadPoolExecutor(PREVIEWS_AT_ONCE, "preview"), Turns(PREVIEWS_AT_ONCE)

    async def make(self, request: web.Request, name: str, width: int) -> Opened:
        """Return what `open_preview` returns, one at a time to each client. Raises what it raises, and 503."""
        try:
            async with awake.timeout(PREVIEW_S), self._turns.turn(request[CLIENT]):
                job = self._threads.submit(open_preview, request.app, name, width)
                try:
                    return await asyncio.wrap_future(job)
                except asyncio.CancelledError:
                    job.add_done_callback(_close)
                    raise
        except TimeoutError:
            reason = f"The preview of '{shortened(name)}' takes too long; try again"
            raise web.HTTPServiceUnavailable(text=reason) from None

    def close(self) -> None:
        """Begin no more of them."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _close(job: Future[Opened]) -> None:
    """Close what comes too late to be sent."""
    if not job.cancelled() and not job.exception():
        job.result().file.close()


PREVIEWS = web.AppKey("previews", PreviewPool)


def open_output(app: web.Application, name: str) -> Opened:
    """Open an output file. Raises 404, 403 if the daemon may not read it, 503 if the disk can't. Blocks."""
    return Opened.of(_find(app, name))


def open_preview(app: web.Application, name: str, width: int) -> Opened:
    """Return the thumbnail of an output file. Raises what `open_output` raises, and NoPreview. Blocks."""
    with _find(app, name) as file:
        source = Opened.of(file)
        try:
            jpeg = app[OUTPUTS].thumbnail(file, width)
        except OSError as error:
            raise _unreadable(name, error) from None
    size = jpeg.seek(0, os.SEEK_END)
    jpeg.seek(0)  # without a descriptor, asyncio reads from where it is
    return source._replace(file=jpeg, size=size, etag=f'{source.etag[:-1]}-{width}"')


def _find(app: web.Application, name: str) -> BufferedReader:
    try:
        file = app[OUTPUTS].find(name)
    except Unreadable as error:
        raise _unreadable(name, error) from None
    except OSError as error:
        raise folder_away(app, error) from None
    if file is None:
        raise web.HTTPNotFound(text=f"File '{shortened(name)}' not found; GET {API}/outputs lists those there are")
    return file


def _unreadable(name: str, error: OSError) -> web.HTTPException:
    """Return the error for a file that is there and can't be read."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return web.HTTPForbidden(text=f"File '{name}' can't be read by the daemon's user; change its permissions")
    return web.HTTPServiceUnavailable(text=f"File '{name}' can't be read now: {error.strerror}")


def folder_away(app: web.Application, error: OSError) -> web.HTTPException:
    """Return the error for an output folder that is not there or can't be read."""
    shown = app[CONFIG].shown_save_path
    remedy = "let the daemon's user read it" if isinstance(error, PermissionError) else "bring the folder back"
    return web.HTTPServiceUnavailable(text=f"save_path: {shown} can't be read now: {error.strerror}; {remedy}")


async def send_file(request: web.Request, opened: Opened, content_type: str, **headers: str) -> web.StreamResponse:
    """Send the file, or the range of it that the request asks for, and close it.

    Raises 412 if a condition is not met, and 416 for a range outside the file. Where fewer bytes than announced can be
    sent, the connection ends: the client would take the next answer for the missing ones.
    """
    with opened.file:
        unchanged = _unchanged(request, opened)
        part = None if unchanged else byte_range(_range_header(request, opened), opened.size)
        wanted = range(0) if unchanged else part or range(opened.size)
        response = web.StreamResponse(status=304 if unchanged else 206 if part else 200)
        response.headers.update({hdrs.ACCEPT_RANGES: "bytes", hdrs.ETAG: opened.etag, **headers})
        response.last_modified = opened.modified
        if not unchanged:
            response.content_type, response.content_length = content_type, len(wanted)
        if part:
            response.headers[hdrs.CONTENT_RANGE] = f"bytes {part.start}-{part.stop - 1}/{opened.size}"
        try:
            await response.prepare(request)
            if wanted and request.method != hdrs.METH_HEAD and request.transport:
                loop = asyncio.get_running_loop()
                if await loop.sendfile(request.transport, opened.file, wanted.start, len(wanted)) < len(wanted):
                    response.force_close()
        except (OSError, RuntimeError):  # the client has gone, or the disk; RuntimeError: the connection is closing
            response.force_close()
        return response


def inline(name: str) -> str:
    """Return the Content-Disposition of a file that a browser shows.

    `filename` is in ASCII; if that is not quite the name, it is in `filename*` too, as RFC 8187 encodes it.
    """
    plain = re.sub(r'[^ -~]|["\\]', "_", name)
    encoded = "" if plain == name and "%" not in name else f"; filename*=UTF-8''{quote(name, safe='!#$&+^`|')}"
    return f'inline; filename="{plain}"{encoded}'


def _unchanged(request: web.Request, opened: Opened) -> bool:
    """True if the client's copy is still right. Raises 412 if the request is about another version of the file."""
    tag, modified = opened.etag.strip('"'), opened.modified
    tags = request.if_match
    if tags is not None:
        met = any(known.value in ("*", tag) and not known.is_weak for known in tags)
    else:
        met = modified <= _time(request, "if_unmodified_since", math.inf)
    if not met:
        raise web.HTTPPreconditionFailed(text="If-Match, If-Unmodified-Since: the file is another one now")
    tags = request.if_none_match
    if tags is not None:
        return any(known.value in ("*", tag) for known in tags)
    return modified <= _time(request, "if_modified_since", -math.inf)


def _time(request: web.Request, condition: str, without: float) -> float:
    """The time in a condition of the request; `without` if it has none, or one that can't be."""
    with suppress(OverflowError):  # aiohttp lets it through for seconds beyond a C int
        if (date := getattr(request, condition)) is not None:
            return float(date.timestamp())
    return without


def _range_header(request: web.Request, opened: Opened) -> str:
    """The Range header; "" if `If-Range` names another version of the file, of which the client has a part."""
    condition = request.headers.get(hdrs.IF_RANGE)
    if condition in (None, opened.etag) or _time(request, "if_range", math.inf) == opened.modified:
        return ",".join(request.headers.getall(hdrs.RANGE, ()))
    return ""


def byte_range(header: str, size: int) -> range | None:
    """Return the bytes that a Range header asks for of a file of `size` bytes, None for the whole file.

    Also None if the header is malformed, in another unit or of several ranges, and for an empty file. Raises 416 if no
    range has a byte of the file.
    """
    unit, _, rest = header.partition("=")
    texts = [text for text in re.split(r"[ \t]*,[ \t]*", rest) if text]
    well_formed = all(re.fullmatch("[0-9]+-[0-9]*|-[0-9]+", text) for text in texts)
    if unit.lower() != "bytes" or not texts or not well_formed or not size:
        return None
    ranges = []
    for text in texts:
        first, last = (float(digits or "inf") for digits in text.split("-"))  # not int, which limits the digits
        if text.startswith("-"):
            first, last = max(size - last, 0), size
        if last < first:
            return None
        ranges.append(range(int(min(first, size)), int(min(last + 1, size))))
    if not any(ranges):
        sentence = f"Range: the file has {size} bytes, no such range in it"
        raise web.HTTPRequestRangeNotSatisfiable(text=sentence, headers={hdrs.CONTENT_RANGE: f"bytes */{size}"})
    return ranges[0] if len(ranges) == 1 else None
