"""Picture and video files for the daemon: whether an input is whole, and a thumbnail.

All of it blocks. Pillow and PyAV are imported inside the functions: together they cost 26 MiB and a tenth of a second,
which a daemon that only queues must not pay at its start.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from engine.files import footage

if TYPE_CHECKING:
    from PIL.Image import Image

MEDIA_TYPES: Final[Mapping[str, tuple[str, str]]] = {
    ".mp4": ("video", "video/mp4"),
    ".webm": ("video", "video/webm"),
    ".mkv": ("video", "video/x-matroska"),
    ".mov": ("video", "video/quicktime"),
    ".png": ("image", "image/png"),
    ".jpg": ("image", "image/jpeg"),
    ".jpeg": ("image", "image/jpeg"),
    ".webp": ("image", "image/webp"),
    ".wav": ("audio", "audio/wav"),
    ".flac": ("audio", "audio/flac"),
    ".mp3": ("audio", "audio/mpeg"),
    ".ogg": ("audio", "audio/ogg"),
}
"""Lower-case suffix → (kind, content type). A file with any other suffix is no media file."""

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # in EXIF: the tag, and the values that exchange width and height
_MAX_SCANS, _MAX_SEGMENTS = 100, 5000  # of a JPEG; each scan is work on all pixels, in as little as 30 bytes
_SEGMENT: Final = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])(..)", re.DOTALL)  # its kind, and its length
_SCAN, _END = b"\xda", b"\xd9"


class BadImage(Exception):
    """An input is no usable picture. One sentence without its subject: "is not a PNG, JPEG or WebP image"."""


class NoPreview(Exception):
    """A file has no picture to show. One sentence that names the file."""


def check_image(file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """Decode an open PNG, JPEG or WebP to its end; return (width, height) in pixels as shown, EXIF orientation applied.

    Raises BadImage and nothing else; for more than `max_pixels` before memory is taken for them.
    """
    with _opened(file, max_pixels) as image:
        width, height = image.size
        image.draft("L", (1, 1))  # a JPEG is read to its end, and takes a 64th of the memory
        if image.format != "WEBP" or not _is_webp(file, max_pixels):
            image.load()  # truncation shows only here
        with suppress(Exception):  # as in `_upright`
            if image.getexif().get(_ORIENTATION) in _TURNED:
                return height, width
        return width, height


def _is_webp(file: BinaryIO, max_pixels: int) -> bool:
    """True if FFmpeg can decode the picture: with 7 bytes a pixel, where Pillow takes 16. It knows no animations."""
    with suppress(footage.BadFootage), footage.opened(file, "image", max_pixels) as stream:
        footage.first_frame(stream)
        return True
    return False


def open_image(path: Path) -> "Image":
    """Return the picture (of an animation the first): RGB, upright, on white. Raises BadImage, FileNotFoundError."""
    with path.open("rb") as file, _opened(file) as image:
        return _flattened(_upright(image))


def thumbnail(file: BufferedReader, width: int) -> bytes:
    """Return a JPEG of an open file, at most `width` pixels wide. Raises NoPreview if it shows nothing, or OSError."""
    path = Path(file.name)
    kind, _ = MEDIA_TYPES.get(path.suffix.lower(), ("of an unknown type", ""))
    if kind not in ("image", "video"):
        raise NoPreview(f"'{path.name}' is {kind} and has no picture; a preview needs an image or a video")
    file.peek(1)  # a disk that can't be read shows here, apart from bytes that can't be decoded
    try:
        if kind == "video":
            with footage.opened(file, "video") as stream:
                return reduced(footage.picture(footage.first_frame(stream)), width)
        with _opened(file) as image:
            # A JPEG can be decoded at 1/2, 1/4 or 1/8: far quicker. A square, as EXIF may turn the picture later.
            image.draft("RGB", (width, width))
            return reduced(_flattened(_upright(image)), width)
    except Exception:  # FFmpeg and Pillow raise many kinds on hostile bytes; to the caller all mean the same
        raise NoPreview(f"'{path.name}' can't be decoded, so it has no preview") from None


def reduced(image: "Image", width: int) -> bytes:
    """Return a JPEG of the picture, which is shrunk to at most `width` pixels in width."""
    from PIL import Image

    image.thumbnail((width, image.height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


@contextmanager
def _opened(file: BinaryIO, max_pixels: int = footage.MAX_PIXELS) -> Iterator["Image"]:
    """A picture of at most `max_pixels`, none decoded yet; what the decoders raise in the block becomes BadImage."""
    # Pillow knows PNG and JPEG from the start; for a WebP plugin not yet imported it would import all 45 that it has.
    from PIL import Image, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

    try:
        if _has_many_scans(file):
            raise BadImage(f"is a JPEG of over {_MAX_SCANS} scans or {_MAX_SEGMENTS} segments; save it as a usual one")
        file.seek(0)
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width}x{image.height}"
                raise BadImage(f"is {size}, more than the limit of {max_pixels} pixels; send a smaller image")
            yield image
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("is not a PNG, JPEG or WebP image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage("has more pixels than can be decoded safely; send a smaller image") from None
    except Exception:  # OSError, SyntaxError, struct.error, ValueError, EOFError, zlib.error …: hostile bytes reach all
        raise BadImage("is damaged or cut off; send the whole image again") from None


def _has_many_scans(file: BinaryIO) -> bool:
    """Whether a JPEG has more scans, or segments, than any camera or program writes. Holds no more than 64 KiB."""
    scans, segments, at = 0, 0, 2
    file.seek(0)
    is_jpeg = file.read(at) == b"\xff\xd8"
    while is_jpeg and file.seek(at) and len(chunk := file.read(2**16)) > 3:
        segment = _SEGMENT.search(chunk)
        if segment is None:
            at += len(chunk) - 3  # which may begin one
            continue
        if segment[1] == _END:
            break
        scans, segments = scans + (segment[1] == _SCAN), segments + 1
        if scans > _MAX_SCANS or segments > _MAX_SEGMENTS:
            return True
        at += segment.end(1) + max(2, int.from_bytes(segment[2]))
    return False


def _upright(image: "Image") -> "Image":
    """The picture decoded, and turned as its EXIF says; a broken EXIF must not cost a good picture."""
    from PIL import ImageOps

    image.load()  # truncation shows only here
    with suppress(Exception):  # the parser raises as many kinds as the decoders do
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _flattened(image: "Image") -> "Image":
    """The picture in RGB, its transparent parts white."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip at 255 instead of scaling down
        return image.point(lambda value: value / 256).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
