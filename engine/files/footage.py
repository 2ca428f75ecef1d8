"""Videos and sounds as FFmpeg reads them: whether an input is whole, how long it is, and its frames.

All of it blocks. PyAV is imported inside the functions, since a daemon that only queues must not pay for it.
"""

import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from PIL.Image import Image

MAX_S: Final = 3600  # of an input; nothing that is generated comes near
# The demuxer is named by the first bytes, never guessed: a playlist could make FFmpeg open other files and addresses.
_DEMUXERS: Final = {
    "video": {rb".{4}ftyp": "mov", rb"\x1a\x45\xdf\xa3": "matroska"},
    "audio": {rb".{8}WAVE": "wav", b"fLaC": "flac", b"OggS": "ogg", rb"ID3|\xff[\xf3\xfb]": "mp3", rb".{4}ftyp": "mov"},
}
_FORMATS: Final = {"video": "an MP4, MOV, WebM or MKV video", "audio": "a WAV, FLAC, MP3 or OGG sound"}


class BadFootage(Exception):
    """An input is no usable video or sound. One sentence without its subject: "is not an MP4 …"."""


def check(file: BinaryIO, kind: str, max_pixels: int) -> float:
    """The length in seconds of an open `kind` "video" or "audio", its first moments decoded. Raises BadFootage only."""
    with opened(file, kind) as container:
        stream = getattr(container.streams, kind)[0]
        if kind == "video":
            first_frame(container, max_pixels)
        else:
            next(container.decode(stream))
        seconds = _seconds(container, stream)
        if not 0 < seconds <= MAX_S:
            raise BadFootage(f"is {seconds:.0f} seconds long, but must be longer than 0 and at most {MAX_S}")
        return seconds


def first_frame(container: "InputContainer", max_pixels: int) -> "VideoFrame":
    """The first frame of an opened video. Raises BadFootage for one of more than `max_pixels`, before it is decoded."""
    stream = container.streams.video[0]
    if stream.width * stream.height > max_pixels:
        size = f"{stream.width}x{stream.height}"
        raise BadFootage(f"is {size}, more than the limit of {max_pixels} pixels a frame; send a smaller one")
    stream.codec_context.thread_count = 1  # threads would decode frames that are not used
    return next(container.decode(stream))


def picture(frame: "VideoFrame") -> "Image":
    """The frame in mode RGB and upright: phones film sideways and say so."""
    image: Image = frame.to_image()  # type: ignore[no-untyped-call]  # PyAV has no type for it
    return image.rotate(frame.rotation, expand=True)


def read_frames(path: Path, fps: int, count: int, start: int = 0) -> "list[Image]":
    """At most `count` frames from `start` on, as shown at `fps` frames a second: RGB, upright. Raises BadFootage."""
    with path.open("rb") as file, opened(file, "video") as container:
        return [picture(frame) for frame in islice(_at_rate(container, fps), start, start + count)]


def read_last_frames(path: Path, fps: int, count: int) -> "list[Image]":
    """The last `count` frames, else as `read_frames`."""
    with path.open("rb") as file, opened(file, "video") as container:
        return [picture(frame) for frame in deque(_at_rate(container, fps), maxlen=count)]


def _at_rate(container: "InputContainer", fps: int) -> "Iterator[VideoFrame]":
    """The frame that is shown at each tick of `fps`: some come more than once, some never."""
    stream: Any = container.streams.video[0]
    starts_s = float((stream.start_time or 0) * stream.time_base)
    shown_s = 1 / float(stream.average_rate or 25) - 1e-3  # slightly less: times are rounded to the time base
    ticks = 0
    for frame in container.decode(stream):
        while ticks / fps < (frame.time or 0) - starts_s + shown_s:
            yield frame
            ticks += 1


def _seconds(container: "InputContainer", stream: Any) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return container.duration / 1e6
    return max((float(frame.time or 0) for frame in container.decode(stream)), default=0.0)


@contextmanager
def opened(file: BinaryIO, kind: str) -> "Iterator[InputContainer]":
    """The container; whatever FFmpeg raises, here or inside the block, leaves as BadFootage."""
    import av

    head = file.read(16)
    file.seek(0)
    demuxer = next((name for mark, name in _DEMUXERS[kind].items() if re.match(mark, head, re.DOTALL)), None)
    if demuxer is None:
        raise BadFootage(f"is not {_FORMATS[kind]}")
    try:
        with av.open(file, mode="r", format=demuxer) as container:
            yield container
    except BadFootage:
        raise
    except Exception:  # hostile bytes reach many kinds: av.FFmpegError, StopIteration, IndexError, ValueError …
        raise BadFootage(f"is damaged or cut off, or holds no {kind}; send the whole file again") from None
