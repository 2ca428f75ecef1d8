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
    from PIL.Image import Image

MAX_S: Final = 3600  # of an input; nothing that is generated comes near
MAX_PIXELS: Final = 64_000_000  # of a frame: 8K twice over; decoded as RGB it takes 190 MB
MAX_STREAMS: Final = 100  # of a file; a film has subtitles and fonts too
MAX_PACKETS: Final = MAX_S * 120  # of all streams of a file
MAX_HIDDEN_FRAMES: Final = 250  # that are decoded before the first that is shown
# The demuxer is named by the first bytes, never guessed: a playlist could make FFmpeg open other files and addresses.
_DEMUXERS: Final = {
    "video": {rb".{4}ftyp": "mov", rb"\x1a\x45\xdf\xa3": "matroska"},
    "image": {rb"RIFF.{4}WEBP": "webp_pipe"},
    "audio": {rb".{8}WAVE": "wav", b"fLaC": "flac", b"OggS": "ogg", rb"ID3|\xff[\xf3\xfb]": "mp3", rb".{4}ftyp": "mov"},
}
_FORMATS: Final = {"video": "an MP4, MOV, WebM or MKV video", "audio": "a WAV, FLAC, MP3 or OGG sound"}


class BadFootage(Exception):
    """An input is no usable video or sound. One sentence without its subject: "is not an MP4 …"."""


def check(file: BinaryIO, kind: str, max_pixels: int) -> float:
    """The length in seconds of an open `kind` "video" or "audio", its first moments decoded. Raises BadFootage only."""
    with opened(file, kind, min(max_pixels, MAX_PIXELS)) as stream:
        first_frame(stream)
        seconds = _seconds(stream)
        if not 0 < seconds <= MAX_S:
            raise BadFootage(f"is {seconds:.0f} seconds long, but must be longer than 0 and at most {MAX_S}")
        return seconds


def first_frame(stream: Any) -> Any:
    """The first frame, a VideoFrame or AudioFrame, of a stream that nothing was read of yet."""
    stream.codec_context.thread_count = 1  # threads would decode frames that are not used
    packets = islice(stream.container.demux(stream), MAX_HIDDEN_FRAMES)
    return next(frame for packet in packets for frame in packet.decode())


def picture(frame: "VideoFrame") -> "Image":
    """The frame in mode RGB and upright: phones film sideways and say so."""
    image: Image = frame.to_image()  # type: ignore[no-untyped-call]  # PyAV has no type for it
    return image.rotate(frame.rotation, expand=True)


def read_frames(path: Path, fps: int, count: int, start: int = 0) -> "Iterator[Image]":
    """At most `count` frames from `start` on, as shown at `fps` frames a second: RGB, upright. Raises BadFootage."""
    with path.open("rb") as file, opened(file, "video") as stream:
        yield from map(picture, islice(_at_rate(stream, fps), start, start + count))


def read_last_frames(path: Path, fps: int, count: int) -> "list[Image]":
    """The last `count` frames, else as `read_frames`."""
    with path.open("rb") as file, opened(file, "video") as stream:
        return [picture(frame) for frame in deque(_at_rate(stream, fps), maxlen=count)]


def _at_rate(stream: Any, fps: int) -> "Iterator[VideoFrame]":
    """The frame that is shown at each tick of `fps`: some come more than once, some never."""
    starts_s = float((stream.start_time or 0) * stream.time_base)
    shown_s = 1 / float(stream.average_rate or 25) - 1e-3  # slightly less: times are rounded to the time base
    ticks = 0
    for frame in islice(stream.container.decode(stream), MAX_PACKETS):
        while ticks / fps < (frame.time or 0) - starts_s + shown_s:
            yield frame
            ticks += 1


def _seconds(stream: Any) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if stream.container.duration:
        return float(stream.container.duration / 1e6)
    ends_at = 0  # without a length in the header: of the packets, since to decode them could take hours
    for count, packet in enumerate(stream.container.demux()):
        if count == MAX_PACKETS:
            raise BadFootage(f"does not say how long it is and has over {MAX_PACKETS} packets; send it with its length")
        if packet.stream_index == stream.index and packet.pts is not None:
            ends_at = max(ends_at, packet.pts + (packet.duration or 0))
    return float(ends_at * stream.time_base)


@contextmanager
def opened(file: BinaryIO, kind: str, max_pixels: int = MAX_PIXELS) -> "Iterator[Any]":
    """The first stream of the kind; whatever FFmpeg raises, here or inside the block, leaves as BadFootage.

    No frame of it, whatever the headers say, takes memory for more than `max_pixels` when it is decoded.
    """
    import av

    file.seek(0)
    head = file.read(16)
    file.seek(0)
    demuxer = next((name for mark, name in _DEMUXERS[kind].items() if re.match(mark, head, re.DOTALL)), None)
    if demuxer is None:
        raise BadFootage(f"is not {_FORMATS[kind]}")
    try:
        limits = {"max_pixels": str(max_pixels)}  # for the frames that are decoded to find out about the streams
        with av.open(file, mode="r", format=demuxer, options={**limits, "max_streams": str(MAX_STREAMS)}) as container:
            stream: Any = (container.streams.audio if kind == "audio" else container.streams.video)[0]
            if kind != "audio" and stream.width * stream.height > max_pixels:
                rule = f"more than the limit of {max_pixels} pixels a frame; send a smaller one"
                raise BadFootage(f"is {stream.width}x{stream.height}, {rule}")
            stream.codec_context.options = limits
            yield stream
    except BadFootage:
        raise
    except Exception:  # hostile bytes reach many kinds: av.FFmpegError, StopIteration, IndexError, ValueError …
        raise BadFootage(f"is damaged or cut off, or holds no {kind}; send the whole file again") from None
