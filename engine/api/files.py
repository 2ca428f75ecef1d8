"""Files in HTTP: which may be sent, byte ranges, conditions, and the headers of a download.

Not aiohttp's FileResponse: it takes a malformed Range for one that can't be satisfied, answers a file that can't be
opened with an empty body, and keeps the connection after a file that was cut while it was sent.
"""

import asyncio
import errno
import logging
import math
import os
import re
import time
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from aiohttp import ETag, hdrs, web

from engine.api.answers import shortened
from engine.api.app_keys import API, CONFIG, OUTPUTS
from engine.files.media import NoPreview

log = logging.getLogger("wangpd")


class Opened(NamedTuple):
    """A file that is open, and what was known of it then."""

    path: Path
    file: BinaryIO
    about: os.stat_result

    @property
    def etag(self) -> str:
        """The validator of this version of the file."""
        return f"{self.about.st_mtime_ns:x}-{self.about.st_size:x}"

    @property
    def modified(self) -> int:
        """Last-Modified in seconds since the epoch, which by HTTP's rule is never in the future."""
        return int(max(0, min(math.ceil(self.about.st_mtime), time.time())))


def open_output(app: web.Application, name: str) -> Opened:
    """Open an output file. Raises 404, 403 if the daemon may not read it, 503 if the disk can't. Blocks."""
    return _open(_find(app, name))


def open_preview(app: web.Application, name: str, width: int) -> Opened | bytes:
    """Open the thumbnail of an output file, or return its bytes if it can't be cached now. Blocks.

    Raises what `open_output` raises, and 400 for a file without a picture.
    """
    path = _find(app, name)
    try:
        thumbnail = app[OUTPUTS].thumbnail(path, width)
    except NoPreview as error:
        raise web.HTTPBadRequest(text=str(error)) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    return thumbnail if isinstance(thumbnail, bytes) else _open(thumbnail)


def _find(app: web.Application, name: str) -> Path:
    try:
        path = app[OUTPUTS].find(name)
    except OSError as error:
        raise folder_away(app, error) from None
    if path is None:
        raise web.HTTPNotFound(text=f"File '{shortened(name)}' not found; GET {API}/outputs lists those there are")
    return path


def _open(path: Path) -> Opened:
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
        return Opened(path, file, os.fstat(file.fileno()))
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> web.HTTPException:
    """Return the error for a file that is listed and can't be opened."""
    if error.errno in (errno.ENOENT, errno.ELOOP):  # ELOOP: a symbolic link has replaced it
        return web.HTTPNotFound(text=f"File '{path.name}' not found; it was removed just now")
    if isinstance(error, PermissionError):
        return web.HTTPForbidden(text=f"File '{path.name}' can't be read by the daemon's user; change its permissions")
    return web.HTTPServiceUnavailable(text=f"File '{path.name}' can't be read now: {error.strerror}")


def folder_away(app: web.Application, error: OSError) -> web.HTTPException:
    """Return the error for an output folder that is not there or can't be read."""
    shown = app[CONFIG].shown_save_path
    remedy = "let the daemon's user read it" if isinstance(error, PermissionError) else "bring the folder back"
    return web.HTTPServiceUnavailable(text=f"save_path: {shown} can't be read now: {error.strerror}; {remedy}")


async def send_file(request: web.Request, opened: Opened, content_type: str, **headers: str) -> web.StreamResponse:
    """Send the file, or the range of it that the request asks for, and close it.

    Raises 412 if a condition is not met, and 416 for a range outside the file. Where the file ends early or can't be
    read any more, the connection ends too: the client would take the next answer for the missing bytes.
    """
    with opened.file:
        about: dict[str, str] = {hdrs.ETAG: f'"{opened.etag}"', **headers}
        if _unchanged(request, opened):
            response: web.StreamResponse = web.Response(status=304, headers=about)
            response.last_modified = opened.modified
            return response
        size = opened.about.st_size
        part = byte_range(_range_header(request, opened), size)
        if part is not None:
            about[hdrs.CONTENT_RANGE] = f"bytes {part.start}-{part.stop - 1}/{size}"
        response = web.StreamResponse(status=200 if part is None else 206, headers=about)
        response.headers[hdrs.ACCEPT_RANGES] = "bytes"
        response.content_type, response.last_modified = content_type, opened.modified
        part = range(size) if part is None else part
        response.content_length = len(part)
        sent = await _sent(request, response, opened.file, part)
        if sent < len(part):
            log.debug("%s: %d of %d bytes could be sent", opened.path.name, sent, len(part))
            response.force_close()
        return response


async def _sent(request: web.Request, response: web.StreamResponse, file: BinaryIO, part: range) -> int:
    """Send the head of the answer, then these bytes of the file; returns how many were sent, as far as is known."""
    try:
        await response.prepare(request)
        if request.method == hdrs.METH_HEAD or not part or request.transport is None:
            return len(part)
        return await asyncio.get_running_loop().sendfile(request.transport, file, part.start, len(part))
    except (OSError, RuntimeError):  # the client has gone, which is a RuntimeError to sendfile; or the disk has
        return 0


def inline(name: str) -> str:
    """Return the Content-Disposition of a file that a browser shows.

    `filename` is plain ASCII; where that is not the whole truth, `filename*` has the name as RFC 8187 encodes it.
    """
    plain = re.sub(r'[^ -~]|["\\]', "_", name)
    encoded = "" if plain == name and "%" not in name else f"; filename*=UTF-8''{quote(name, safe='!#$&+^`|')}"
    return f'inline; filename="{plain}"{encoded}'


# ---- conditions and ranges, by RFC 9110


def _unchanged(request: web.Request, opened: Opened) -> bool:
    """True if the client's copy is still right. Raises 412 if it wants the file only as it was."""
    if (tags := request.if_match) is not None:
        changed = not _among(tags, opened.etag, weak=False)
    else:
        changed = not _not_after(opened.modified, request.if_unmodified_since, default=True)
    if changed:
        sentence = "If-Match, If-Unmodified-Since: the file is another than the request names"
        raise web.HTTPPreconditionFailed(text=sentence)
    if (tags := request.if_none_match) is not None:
        return _among(tags, opened.etag, weak=True)
    return _not_after(opened.modified, request.if_modified_since, default=False)


def _among(tags: tuple[ETag, ...], etag: str, *, weak: bool) -> bool:
    return any(tag.value in ("*", etag) and (weak or not tag.is_weak) for tag in tags)


def _not_after(seconds: int, date: datetime | None, *, default: bool) -> bool:
    return default if date is None else seconds <= date.timestamp()


def _range_header(request: web.Request, opened: Opened) -> str:
    """The Range header; "" if `If-Range` names another version of the file, of which the client has a part."""
    condition = request.headers.get(hdrs.IF_RANGE)
    if condition is not None and condition != f'"{opened.etag}"':
        date = None if '"' in condition else request.if_range
        if date is None or date.timestamp() != opened.modified:
            return ""
    return ",".join(request.headers.getall(hdrs.RANGE, ()))


def byte_range(header: str, size: int) -> range | None:
    """Return the bytes of a file of `size` bytes that a Range header asks for, None for the whole file.

    The whole also where the header is malformed, in another unit, or has several ranges, of which any is in the file.
    Raises 416 if none is.
    """
    unit, _, rest = header.partition("=")
    pairs = [re.fullmatch(r"([0-9]*)-([0-9]*)", text) for text in re.split(r"[ \t]*,[ \t]*", rest) if text]
    if unit.lower() != "bytes" or not pairs:
        return None
    found, satisfiable = range(0), False
    for pair in pairs:
        if pair is None or pair[0] == "-":
            return None
        first, last = _number(pair[1]), _number(pair[2])
        if pair[1] and pair[2] and last < first:
            return None
        found = range(first, min(last + 1, size) if pair[2] else size) if pair[1] else range(max(size - last, 0), size)
        satisfiable |= first < size if pair[1] else last > 0
    if not satisfiable:
        sentence = f"Range: the file has {size} bytes, no such range in it"
        raise web.HTTPRequestRangeNotSatisfiable(text=sentence, headers={hdrs.CONTENT_RANGE: f"bytes */{size}"})
    return found if len(pairs) == 1 and found else None


def _number(digits: str) -> int:
    """A position, cut to 20 digits, which is beyond any file: Python refuses to read thousands of them."""
    return int(digits.lstrip("0")[:20] or 0)
