"""Small files that are much work, as an attacker makes them."""

import io
import struct
import zlib
from fractions import Fraction

import av

TICK = Fraction(1, 25)  # seconds


def packets(side: int, count: int = 2) -> list[bytes]:
    """H.264 packets of grey frames, the first a key frame with its parameters; the others take a few bytes."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = side, side, "yuv420p"
    encoder.time_base, encoder.framerate = TICK, 1 / TICK
    wanted = "keyint=100000:scenecut=0:annexb=1:repeat-headers=1:ref=1"
    encoder.options = {"preset": "ultrafast", "tune": "zerolatency", "x264-params": wanted}
    frame = av.VideoFrame(side, side, "yuv420p")
    for plane in frame.planes:
        plane.update(b"\x80" * plane.buffer_size)
    made: list[bytes] = []
    for pts in range(2):
        frame.pts = pts
        made += [bytes(packet) for packet in encoder.encode(frame)]
    return made[:1] + made[1:] * (count - 1)


def video(frames: list[bytes], container: str, sounds: int = 0, **options: str) -> bytes:
    """These packets in a file that says 64x64, beside silent `sounds`."""
    if container == "webm":
        return _vp8()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options) as target:
        stream = target.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        silent = [target.add_stream("aac", rate=8000) for _ in range(sounds)]
        target.start_encoding()
        for sound_stream in silent:
            packet = av.Packet(bytes(64))
            packet.stream, packet.pts, packet.dts, packet.time_base = sound_stream, 0, 0, TICK
            target.mux(packet)
        for pts, data in enumerate(frames):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, pts, pts, TICK
            packet.is_keyframe = pts == 0 or len(data) > 10 * len(frames[1])
            target.mux(packet)
    return buffer.getvalue()


def _vp8() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as target:
        stream = target.add_stream("libvpx", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in (av.VideoFrame(64, 64, "yuv420p"), None):
            target.mux(stream.encode(frame))
    return buffer.getvalue()


def sound(container: str) -> bytes:
    """A tenth of a second of silence."""
    codecs = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame", "ogg": "libopus", "mp4": "aac"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as target:
        stream = target.add_stream(codecs[container], rate=16000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=1600)
        frame.sample_rate = 16000
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        for part in (frame, None):
            target.mux(stream.encode(part))
    return buffer.getvalue()


def jpeg(side: int, scans: int) -> bytes:
    """A grey progressive JPEG in which each scan after the first refines all blocks in a few bytes."""

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body

    blocks = (-(-side // 8)) ** 2
    frame = struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\0"
    one_code = bytes([1] + [0] * 15)
    bits = "0" * 15 * -(-blocks // 16384)  # of a run of empty blocks: its code, and 14 bits of its length
    bits += "1" * (-len(bits) % 8)
    run = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    start = b"\xff\xd8" + segment(0xDB, b"\0" + b"\x01" * 64) + segment(0xC2, frame)
    first = segment(0xC4, b"\0" + one_code + b"\0") + segment(0xDA, b"\x01\x01\0\0\0\0") + bytes(-(-blocks // 8))
    further = segment(0xDA, b"\x01\x01\0\x01\x3f\0") + run
    return start + first + segment(0xC4, b"\x10" + one_code + b"\xe0") + further * (scans - 1) + b"\xff\xd9"


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
