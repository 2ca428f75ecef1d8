"""Files in HTTP: byte ranges, conditions, and the headers of a download."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from aiohttp import hdrs, web


class MediaFile(web.FileResponse):
    """A file with all of HTTP's range semantics; aiohttp's own response compares `If-Range` by date only."""

    def __init__(self, path: Path, about: os.stat_result, headers: Mapping[str, str]) -> None:
        super().__init__(path, headers=headers)
        self._about = about

    async def prepare(self, request: web.BaseRequest) -> Any:
        headers = request.headers.copy()
        headers.popall(hdrs.ACCEPT_ENCODING, None)  # a `name.mp4.gz` that is there by chance is not this file
        if not range_applies(request, self._about):
            headers.popall(hdrs.RANGE, None)  # the client has another version of the file and needs the whole
        return await super().prepare(cast(web.Request, request).clone(headers=headers))


def media_file(request: web.Request, path: Path, content_type: str, **headers: str) -> MediaFile:
    """Return the file at `path`, or the range of it that the request asks for.

    Raises 404 if it is gone, and 416 if the range is outside it.
    """
    try:
        about = path.stat()
    except FileNotFoundError:
        raise gone(path) from None
    if range_applies(request, about):
        try:
            start = request.http_range.start
        except ValueError:
            start = about.st_size
        if re.fullmatch(r"bytes=-0+", request.headers.get(hdrs.RANGE, "")):
            start = about.st_size  # the last 0 bytes, which aiohttp takes for the whole file
        if start is not None and start >= about.st_size:
            sentence = f"Range: the file has {about.st_size} bytes, no such range in it"
            headers = {hdrs.CONTENT_RANGE: f"bytes */{about.st_size}"}
            raise web.HTTPRequestRangeNotSatisfiable(text=sentence, headers=headers)
    return MediaFile(path, about, {hdrs.CONTENT_TYPE: content_type, **headers})


def inline(path: Path) -> str:
    """Return the Content-Disposition of a file that a browser shows."""
    return f'inline; filename="{re.sub(r"[^ -!#-~]", "_", path.name)}"'


def gone(path: Path) -> web.HTTPException:
    """Return the error for a file that was there a moment ago."""
    return web.HTTPNotFound(text=f"File '{path.name}' not found; it was removed just now")


def range_applies(request: web.BaseRequest, about: os.stat_result) -> bool:
    """Return True without `If-Range`, or with one that names this version of the file by its ETag or its date."""
    condition = request.headers.get(hdrs.IF_RANGE)
    if condition is None or condition == f'"{about.st_mtime_ns:x}-{about.st_size:x}"':  # as aiohttp makes it
        return True
    date = None if '"' in condition else cast(web.Request, request).if_range
    return date is not None and about.st_mtime <= date.timestamp()
