"""Media files that are small and long work, or other than they say; each is made once for a folder and size."""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import repeat
from pathlib import Path
from typing import Any

import av
from PIL import Image

from tests.hostile import chunk

RATE = 25
KEYLESS = {
    "preset": "ultrafast",
    "tune": "zerolatency",
    "x264-params": "keyint=100000:scenecut=0:annexb=1:repeat-headers=1:ref=1",
}


def kept(folder: Path, name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns, or returned before."""
    path = folder / name
    if not path.exists():
        path.write_bytes(make())
    return path.read_bytes()


# --------------------------------------------------------------------------------------------------------------- videos


def grey(width: int, height: int) -> av.VideoFrame:
    """A frame with nothing in it."""
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane in frame.planes:
        plane.update(b"\x80" * plane.buffer_size)
    return frame


def packets(width: int, height: int, count: int = 2) -> list[bytes]:
    """A key frame, and frames in which nothing moves, which are a few bytes each."""
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.time_base, encoder.framerate, encoder.options = Fraction(1, RATE), Fraction(RATE, 1), KEYLESS
    frame, made = grey(width, height), []
    for number in range(count):
        frame.pts = number
        made += [bytes(packet) for packet in encoder.encode(frame)]
    return made


def film(width: int, height: int, coded: Sequence[bytes], form: str = "matroska", *, live: bool = False) -> bytes:
    """A file that says this size, and holds these packets; `live`: Matroska without a duration."""
    buffer = io.BytesIO()
    out: Any = av.open(buffer, "w", format=form, options={"live": "1"} if live else {})
    stream = out.add_stream("libx264", rate=RATE)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.options = {"preset": "ultrafast", "tune": "zerolatency"}
    list(stream.encode(grey(width, height)))  # opens the encoder, by which the header is written
    for number, data in enumerate(coded):
        packet = av.Packet(data)
        packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, RATE), number == 0
        packet.pts = packet.dts = number
        out.mux(packet)
    out.close()
    return buffer.getvalue()


def endless(width: int, height: int, frames: int) -> bytes:
    """A Matroska video without a duration, of one key frame and many that change nothing."""
    first, other = packets(width, height)
    return film(width, height, [first, *repeat(other, frames - 1)], live=True)


def larger_inside(side: int, form: str) -> bytes:
    """A video of 64x64 by its container, whose frames have `side` x `side`."""
    return film(64, 64, packets(side, side), form)


def larger_later(side: int, form: str) -> bytes:
    """A video whose first frames have 64x64, and the later ones `side` x `side`."""
    return film(64, 64, [*packets(64, 64), *packets(side, side)], form)


def larger_jpegs(side: int) -> bytes:
    """Motion JPEG of 64x64 by its container, whose pictures have `side` x `side`."""
    buffer, picture = io.BytesIO(), io.BytesIO()
    Image.new("L", (side, side), 128).save(picture, "JPEG")
    out: Any = av.open(buffer, "w", format="matroska")
    stream = out.add_stream("mjpeg", rate=RATE)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
    for number in range(3):
        packet = av.Packet(picture.getvalue())
        packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, RATE), True
        packet.pts = packet.dts = number
        out.mux(packet)
    out.close()
    return buffer.getvalue()


def many_sounds(count: int) -> bytes:
    """A Matroska video with so many sounds that are empty. PyAV writes at most 999."""
    buffer = io.BytesIO()
    out: Any = av.open(buffer, "w", format="matroska")
    stream = out.add_stream("libx264", rate=RATE)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    for _ in range(count):
        out.add_stream("pcm_s16le", rate=8000).layout = "mono"
    frame = grey(64, 64)
    for number in range(3):
        frame.pts, frame.time_base = number, Fraction(1, RATE)
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))
    out.close()
    return buffer.getvalue()


def many_tracks(count: int) -> bytes:
    """An MP4 with its only track so many times."""
    data = film(64, 64, packets(64, 64, 5), "mp4")
    movie, track = data.index(b"moov") - 4, data.index(b"trak") - 4
    (movie_size,), (track_size,) = (struct.unpack_from(">I", data, at) for at in (movie, track))
    copies = data[track : track + track_size] * (count - 1)
    size = struct.pack(">I", movie_size + len(copies))
    return data[:movie] + size + data[movie + 4 : track] + copies + data[track:]


# ------------------------------------------------------------------------------------------------------------- pictures


def scans(side: int, count: int) -> bytes:
    """A progressive JPEG of 99 bytes a scan, each of which touches every block of a large picture."""

    def segment(marker: int, data: bytes) -> bytes:
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data

    frame = struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\0"
    blocks = (-(-side // 8)) ** 2
    dc = segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0")
    first = segment(0xDA, b"\1\1\0\0\0\0") + b"\0" * -(-blocks // 8)
    ac = segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")  # one symbol: a run of 2^14 blocks without a value
    bits = ("0" * 15) * -(-blocks // 16384)
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = segment(0xDA, b"\1\1\0\1\x3f\0") + data
    head = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, frame)
    return head + dc + first + ac + scan * count + b"\xff\xd9"


def png(side: int, *, extra: Iterable[bytes] = ()) -> bytes:
    """A valid grey PNG of one colour, as small as it can be, with further chunks before its pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    squeeze = zlib.compressobj(9)
    pixels = b"".join(squeeze.compress(b"\0" * (side + 1)) for _ in range(side)) + squeeze.flush()
    return b"".join([
        b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    ])  # fmt: skip


def text_chunks(count: int, size: int) -> Iterator[bytes]:
    """Compressed texts that unpack to `size` bytes each."""
    packed = zlib.compress(b"a" * size, 9)
    return (chunk(b"zTXt", b"t%d\0\0" % number + packed) for number in range(count))


def moving(kind: str, side: int, frames: int) -> bytes:
    """An animated PNG or WebP."""
    buffer = io.BytesIO()
    images = [Image.new("RGB", (side, side), (number % 256, 0, 0)) for number in range(frames)]
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], duration=40)
    return buffer.getvalue()


def plain(kind: str, width: int, height: int, **options: Any) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, kind, **options)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------------- sounds


def silence(form: str, codec: str, seconds: float, rate: int = 8000) -> bytes:
    """A sound of nothing, which compresses well."""
    buffer = io.BytesIO()
    out: Any = av.open(buffer, "w", format=form)
    stream = out.add_stream(codec, rate=rate)
    stream.layout = "mono"
    size = 4096
    for number in range(max(1, int(seconds * rate / size))):
        frame = av.AudioFrame(format=stream.codec_context.format or "s16", layout="mono", samples=size)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.rate, frame.pts, frame.time_base = rate, number * size, Fraction(1, rate)
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))
    out.close()
    return buffer.getvalue()


def wave(told_bytes: int, channels: int = 1, rate: int = 8000) -> bytes:
    """A WAV that says it has so many bytes, and has few."""
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * 2 * channels, 2 * channels, 16)
    told = struct.pack("<I", told_bytes & 0xFFFFFFFF)
    return b"RIFF" + told + b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + told + b"\0" * 4000


def flac_claims(samples: int) -> bytes:
    """A FLAC whose header says so many samples."""
    data = bytearray(silence("flac", "flac", 1))
    at = re.search(b"fLaC", data)
    assert at
    place = at.start() + 4 + 4 + 13  # of the 36 bits that count samples, the lower 32 come after a shared byte
    data[place] = data[place] & 0xF0 | samples >> 32 & 0xF
    data[place + 1 : place + 5] = struct.pack(">I", samples & 0xFFFFFFFF)
    return bytes(data)


def tags(count: int, size: int) -> bytes:
    """An MP3 that begins with a long ID3 tag of many frames."""
    frames = b"".join(b"TXXX" + struct.pack(">I", size) + b"\0\0" + b"a" * size for _ in range(count))
    length = len(frames)
    syncsafe = bytes(length >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\0\0" + syncsafe + frames + silence("mp3", "libmp3lame", 1)


# ----------------------------------------------------------------------------------------------------------- containers


def boxes(depth: int, width: int) -> bytes:
    """An MP4 of boxes in boxes, and of many beside each other."""
    nested = struct.pack(">I4s", 8, b"free") * width
    for _ in range(depth):
        nested = struct.pack(">I4s", len(nested) + 8, b"moov") + nested
    return struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 0, b"isom") + nested


def claims_samples(count: int) -> bytes:
    """An MP4 whose table of sample sizes says that it has so many."""
    first, other = packets(64, 64)
    data = bytearray(film(64, 64, [first, *repeat(other, 4)], "mp4"))
    at = data.index(b"stsz")
    data[at + 12 : at + 16] = struct.pack(">I", count)
    return bytes(data)
