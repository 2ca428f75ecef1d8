"""Picture and video files as the daemon sees them: is an input whole, what does a file look like, what made it.

Everything here is synchronous: call it through `asyncio.to_thread`. Pillow and PyAV are imported inside the functions:
together they cost 26 MiB and a tenth of a second, which a daemon that only queues must not pay at its start.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, Final

if TYPE_CHECKING:
    from PIL.Image import Image

MEDIA_TYPES: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
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
)
"""Lower-case suffix → (kind, content type). A file with any other suffix is no media file."""

PNG_KEYWORD: Final = "Comment"  # the keyword that the PNG standard registers for free text
EXIF_IFD: Final = 0x8769
EXIF_USER_COMMENT: Final = 0x9286
EXIF_ASCII: Final = b"ASCII\0\0\0"  # the character code that opens every UserComment

_EXIF_ORIENTATION: Final = 0x0112
_UPRIGHT: Final = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}  # EXIF orientation → the Pillow transposition that undoes it
_TURNED: Final = frozenset({5, 6, 7, 8})  # orientations that swap width and height

_IMAGE_FORMATS: Final = ("PNG", "JPEG", "WEBP")
_DEMUXERS: Final = {".mp4": "mov", ".mov": "mov", ".webm": "matroska", ".mkv": "matroska"}
_MAX_PREVIEW_PIXELS: Final = 64_000_000  # 8K twice over; decoded it takes 190 MB
_THUMBNAIL_QUALITY: Final = 85


class BadImage(Exception):
    """An input is no usable picture. One sentence without its subject: "is not a PNG, JPEG or WebP image"."""


class NoPreview(Exception):
    """A file has no picture to show. One sentence that names the file."""


def check_image(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Decode a PNG, JPEG or WebP to its end and return (width, height) in pixels as shown, EXIF orientation applied.

    The size is read from the header and checked first, so a decompression bomb is refused before it takes memory.
    Raises BadImage and nothing else.
    """
    with _opened(io.BytesIO(data), max_pixels) as image:
        image.load()  # truncation shows only here
        width, height = image.size
        return (height, width) if _orientation(image) in _TURNED else (width, height)


def open_image(path: Path) -> "Image":
    """Return the picture, or the first frame of an animated one: mode RGB, upright, transparency laid on white.

    The format is told by the content, not by the suffix. Raises BadImage, or FileNotFoundError where there is no file.
    """
    with path.open("rb") as file, _opened(file) as image:
        return _upright_rgb(image)


def thumbnail(path: Path, width: int) -> bytes:
    """Return a JPEG of the image or of the video's first frame, `width` pixels wide or less: it is never upscaled.

    The aspect is kept. Raises NoPreview for audio and for what can't be decoded, FileNotFoundError for no file.
    """
    kind, _ = MEDIA_TYPES.get(path.suffix.lower(), ("of an unknown type", ""))
    if kind not in _PICTURES:
        raise NoPreview(f"'{path.name}' is {kind} and has no picture; a preview needs an image or a video")
    try:
        return reduced(_PICTURES[kind](path, width), width)
    except FileNotFoundError:
        raise
    except Exception:  # FFmpeg and Pillow raise many kinds on hostile bytes; to the caller all mean the same
        raise NoPreview(f"'{path.name}' can't be decoded, so it has no preview") from None


def reduced(image: "Image", width: int) -> bytes:
    """Return a JPEG of the picture, at most `width` pixels wide."""
    return _jpeg(_narrowed(image, width))


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings stored in an MP4, PNG, JPEG or WebP file; None where there are none. Raises nothing."""
    kind, _ = MEDIA_TYPES.get(path.suffix.lower(), ("", ""))
    try:
        settings = json.loads(_COMMENTS[kind](path))
    except Exception:  # anyone may have put the file there: no comment, another program's comment, damage, no file
        return None
    return settings if isinstance(settings, dict) else None


@contextmanager
def _opened(file: BinaryIO, max_pixels: int = _MAX_PREVIEW_PIXELS) -> Iterator["Image"]:
    """A picture whose header has been read and whose size is within `max_pixels`; no pixel is decoded yet.

    Whatever the decoders raise, here or inside the `with` block, leaves as BadImage.
    """
    # Pillow knows PNG and JPEG from the start; for a WebP plugin not yet imported it would import all 45 that it has.
    from PIL import Image, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

    try:
        with Image.open(file, formats=_IMAGE_FORMATS) as image:
            _require_pixels(image.size, max_pixels)
            yield image
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("is not a PNG, JPEG or WebP image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage("has more pixels than can be decoded safely; send a smaller image") from None
    except Exception:  # OSError, SyntaxError, struct.error, ValueError, EOFError, zlib.error …: hostile bytes reach all
        raise BadImage("is damaged or cut off; send the whole image again") from None


def _require_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImage(f"is {width}x{height}, more than the limit of {max_pixels} pixels; send a smaller image")


def _orientation(image: "Image") -> int:
    """EXIF orientation, 1 to 8; 1 where it is absent or can't be read: a broken EXIF must not cost a good picture."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # the parser raises as many kinds as the decoders do
        return 1


def _upright_rgb(image: "Image") -> "Image":
    from PIL import Image

    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    flat = _flattened(image)
    return flat.transpose(Image.Transpose[turn]) if turn else flat


def _flattened(image: "Image") -> "Image":
    """The picture in RGB, its transparent parts white."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip at 255 instead of scaling down
        return image.point(lambda value: value / 256).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    coloured = image.convert("RGBA")
    white = Image.new("RGBA", coloured.size, "white")
    return Image.alpha_composite(white, coloured).convert("RGB")


def _drafted_image(path: Path, width: int) -> "Image":
    """The picture, both of its sides still at least `width`, or whole where they never were."""
    with path.open("rb") as file, _opened(file) as image:
        # A JPEG can be decoded at 1/2, 1/4 or 1/8: far quicker. A square, as orientation may turn the picture later.
        image.draft("RGB", (width, width))
        return _upright_rgb(image)


def _first_frame(path: Path, _width: int) -> "Image":
    import av
    from PIL import Image

    with av.open(_url(path), format=_DEMUXERS[path.suffix.lower()]) as container:
        stream = container.streams.video[0]
        _require_pixels((stream.width, stream.height), _MAX_PREVIEW_PIXELS)
        stream.codec_context.thread_count = 1  # threads would decode frames that nobody looks at
        frame = next(container.decode(stream))
        plane = frame.reformat(format="rgb24").planes[0]
        image = Image.frombytes("RGB", (frame.width, frame.height), bytes(plane), "raw", "RGB", plane.line_size)
        return image.rotate(frame.rotation, expand=True)  # phones film sideways and say so


def _url(path: Path) -> str:
    """The file for FFmpeg, which would take a name such as "http:x.mp4" for a network address."""
    return f"file:{path}"


def _narrowed(image: "Image", width: int) -> "Image":
    """The picture at most `width` pixels wide."""
    from PIL import Image

    if image.width <= width:
        return image
    height = max(1, round(image.height * width / image.width))
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def _jpeg(image: "Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_THUMBNAIL_QUALITY)
    return buffer.getvalue()


def _image_comment(path: Path) -> str | bytes:
    """The text inside a PNG, JPEG or WebP; only the parts before the pixels are read."""
    with path.open("rb") as file, _opened(file) as image:
        if text := image.info.get(PNG_KEYWORD):
            return str(text)
        comment = image.getexif().get_ifd(EXIF_IFD).get(EXIF_USER_COMMENT)
        if isinstance(comment, bytes):
            return comment.removeprefix(EXIF_ASCII)
        segments: list[tuple[str, bytes]] = getattr(image, "applist", [])  # only a JPEG has segments
        return b"".join(data for marker, data in segments if marker == "COM")


def _video_comment(path: Path) -> str:
    import av

    with av.open(_url(path), format=_DEMUXERS[path.suffix.lower()]) as container:
        return container.metadata["comment"]


# The demuxer is named, never guessed: a playlist called x.mp4 could make FFmpeg open other files and addresses.
_PICTURES: Final[Mapping[str, Callable[[Path, int], "Image"]]] = {"image": _drafted_image, "video": _first_frame}
_COMMENTS: Final[Mapping[str, Callable[[Path], str | bytes]]] = {"image": _image_comment, "video": _video_comment}
