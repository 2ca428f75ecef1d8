"""Reads the settings that a finished file carries, as another program would."""

import json
from pathlib import Path
from typing import Any

import av
from PIL import ExifTags, Image


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings stored in an MP4, PNG, JPEG or WebP file; None where there are none."""
    comment = _video_comment(path) if path.suffix == ".mp4" else _image_comment(path)
    settings: dict[str, Any] | None = json.loads(comment) if comment else None
    return settings


def _video_comment(path: Path) -> str | None:
    with av.open(path) as container:
        return container.metadata.get("comment")


def _image_comment(path: Path) -> str | bytes:
    """The text inside a PNG, JPEG or WebP."""
    with Image.open(path) as image:
        if text := image.info.get("Comment"):
            return str(text)
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        if isinstance(comment, bytes):
            return comment.removeprefix(b"ASCII\0\0\0")
        segments: list[tuple[str, bytes]] = getattr(image, "applist", [])  # only a JPEG has segments
        return b"".join(data for marker, data in segments if marker == "COM")
