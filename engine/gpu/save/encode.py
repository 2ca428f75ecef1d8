"""Encodes frames and sound to files with their settings inside, published when whole (see `engine.files.publish`).

Each `write_…` raises EngineError with code "save_failed" or STORAGE_FAULT, or what making the frames raises, and leaves
no file then.
Settings are JSON in pure ASCII: no container, tag reader or shell can garble that, not even a lone surrogate.
"""

import io
import json
import logging
import os
import re
import subprocess
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Final, Literal, NamedTuple

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from engine.files.publish import published
from engine.job import STORAGE_FAULT, EngineError, Job

log = logging.getLogger("wangpd.worker")

Pixels = NDArray[np.uint8]
ImageFormat = Literal["png", "jpeg", "webp"]

_HANDLE: Final = "/dev/fd/"
_JPEG_SEGMENT_BYTES: Final = 65533  # a JPEG segment's length has 16 bits and counts itself

# Without the matrix named at both ends, swscale converts with BT.601 and players decode small videos with BT.601 and
# large ones with BT.709: reds and greens shift. The encoder takes its tags from the frames, hence `setparams`.
_BT709: Final = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)

_SOUND_OPTIONS: Final[Mapping[str, list[str]]] = {
    ".wav": ["-c:a", "pcm_s16le", "-f", "wav"],
    ".flac": ["-c:a", "flac", "-f", "flac"],
    ".mp3": ["-c:a", "libmp3lame", "-q:a", "0", "-f", "mp3"],
}

# x264's presets mean nothing to NVENC; its constant quality is about as good as x264's CRF of the same number.
_CODECS: Final[Mapping[str, str]] = {
    "x264": "-c:v libx264 -preset {preset} -crf {crf}",
    "nvenc": "-c:v h264_nvenc -preset p5 -rc vbr -cq {crf} -b:v 0",
}

# Faults of the disk, and those of the task or the installation.
_STORAGE_REMEDIES: Final[Mapping[str, str]] = {
    "No space left on device": "free space on the disk of state_path",
    "Disk quota exceeded": "raise the quota, or free space on the disk of state_path",
    "Read-only file system": "make state_path writable",
    "Permission denied": "let the daemon's user write to state_path",
    "Input/output error": "see to the disk of state_path",
}
_REMEDIES: Final[Mapping[str, str]] = {
    **_STORAGE_REMEDIES,
    "ffmpeg can't be started": "reinstall imageio-ffmpeg or let IMAGEIO_FFMPEG_EXE name a working one",
}


class Sound(NamedTuple):
    """samples: (channels, N) in -1..1, at `sample_rate` a second."""

    samples: NDArray[np.float32]
    sample_rate: int


def output_name(job: Job, seed: int, task_id: int, started: datetime, suffix: str, *, instance: str) -> str:
    """Return e.g. "20261122-210533_t000123-1f3a9c_a-cat-playing-piano_s42.mp4", which no shell needs to quote."""
    plain = unicodedata.normalize("NFKD", job.prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].rstrip("-") or "untitled"
    return f"{started:%Y%m%d-%H%M%S}_t{task_id:06d}-{instance}_{slug}_s{seed}{suffix}"


def write_video(
    path: Path,
    frames: Iterable[Pixels],  # each (H, W, 3) uint8, RGB; taken one by one
    fps: int,
    settings: Mapping[str, Any] | None,
    *,
    crf: int = 18,
    preset: str = "veryfast",
    encoder: str = "x264",
    sound: Sound | None = None,
) -> None:
    """Write an H.264 yuv420p MP4 that plays everywhere: BT.709, its index in front, `settings` in the comment tag.

    An odd width or height gains one column or row, a copy of the last. `sound` becomes its AAC track.
    """
    coming = iter(frames)
    first = next(coming)
    height, width, _ = first.shape
    odd = ((0, height % 2), (0, width % 2), (0, 0))  # yuv420p needs even sides
    size = f"{width + width % 2}x{height + height % 2}"
    picture = f"-f rawvideo -pix_fmt rgb24 -video_size {size} -framerate {fps} -i pipe:0".split()
    codec = _CODECS[encoder].format(preset=preset, crf=crf).split()
    end = ["-map", "1:v", "-vf", _BT709, *codec, "-movflags", "+faststart", "-f", "mp4"]
    with ExitStack() as stack:
        if sound is not None:
            options, samples = _pcm(sound)
            picture += [*options, stack.enter_context(_spooled(samples))]
            end = ["-map", "2:a", "-c:a", "aac", "-b:a", "192k", *end]
        chunks = (np.pad(frame, odd, mode="edge").tobytes() for frame in chain([first], coming))
        _encode(path, chunks, settings, picture, end)


@cache
def works(encoder: str) -> bool:
    """True if this machine can encode with it: NVENC needs a card that has it (an H100 has none) and a driver."""
    codec = _CODECS[encoder].format(preset="veryfast", crf=18)
    trial = f"-v error -f lavfi -i color=size=256x256:rate=1 -frames:v 1 -pix_fmt yuv420p {codec} -f null -"
    with suppress(OSError, RuntimeError, subprocess.CalledProcessError):  # without ffmpeg, the first real file says so
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *trial.split()], capture_output=True, check=True)
        return True
    return False


def write_sound(path: Path, sound: Sound, settings: Mapping[str, Any] | None) -> None:
    """Write a WAV, FLAC or MP3, by the suffix of `path`, with `settings` in its comment tag."""
    options, samples = _pcm(sound)
    _encode(path, [samples], settings, [*options, "pipe:0"], ["-map", "1:a", *_SOUND_OPTIONS[path.suffix]])


def _encode(
    path: Path, chunks: Iterable[bytes], settings: Mapping[str, Any] | None, inputs: list[str], end: list[str]
) -> None:
    """Let ffmpeg make `path` of what is piped in. Its input 0 are the settings; those of `inputs` follow."""
    comment = "" if settings is None else "comment=" + re.sub(r"([\\=;#\n])", r"\\\1", json.dumps(dict(settings)))
    # In a file: one argument of a command line holds 128 KiB, which two long prompts can outgrow.
    metadata = f";FFMETADATA1\n{comment}\n".encode("ascii")
    with _part_of(path) as part, TemporaryFile() as complaints, _spooled(metadata) as tags:
        command = ["-hide_banner", "-loglevel", "error", "-y", "-f", "ffmetadata", "-i", tags, *inputs]
        command += ["-map_metadata", "0", *end, f"file:{part}"]
        # stderr goes to a file: a pipe that nobody reads while the frames are written would fill up and stop ffmpeg.
        with _started(command, complaints, path) as ffmpeg:
            # x264 would take every core: at +5 it gets a third of the generation's share of a core that both need.
            os.setpriority(os.PRIO_PROCESS, ffmpeg.pid, os.getpriority(os.PRIO_PROCESS, 0) + 5)
            assert ffmpeg.stdin
            with suppress(BrokenPipeError), ffmpeg.stdin as pipe:  # it may end early; its status then says why
                pipe.writelines(chunks)
        if ffmpeg.returncode:
            complaints.seek(0)
            text, status = complaints.read().decode(errors="replace"), f"ffmpeg ended with status {ffmpeg.returncode}"
            log.error("%s: %s", status, text.strip())  # its own words hold paths
            raise _save_failed(path, next((cause for cause in _REMEDIES if cause in text), status))


@contextmanager
def _spooled(data: bytes) -> Iterator[str]:
    """The name under which ffmpeg can read `data` within the block."""
    with TemporaryFile() as file:
        file.write(data)
        file.seek(0)  # the name may stand for this very handle, with its position in the file
        yield f"{_HANDLE}{file.fileno()}"


def _pcm(sound: Sound) -> tuple[list[str], bytes]:
    """The options before the name of a raw input, and its bytes: the samples, channels interleaved."""
    options = f"-f f32le -ar {sound.sample_rate} -ac {len(sound.samples)} -i".split()
    return options, sound.samples.T.astype("<f4").tobytes()


def write_image(path: Path, frame: Pixels, settings: Mapping[str, Any] | None, format: ImageFormat) -> None:
    """Write one picture, (H, W, 3) uint8 RGB or (H, W, 4) RGBA, `settings` in its PNG text or its EXIF UserComment."""
    with _part_of(path) as part:
        buffer = io.BytesIO()  # Pillow hides why a write has failed ("encoder error -2"): the disk comes after it
        comment = {} if settings is None else _comment_option(format, json.dumps(dict(settings)))
        Image.fromarray(frame).save(buffer, format, quality=95, subsampling="4:4:4", **comment)
        part.write_bytes(buffer.getbuffer())


@contextmanager
def _part_of(final: Path) -> Iterator[Path]:
    """As `published`, but what the disk or Pillow raises becomes an EngineError."""
    try:
        with published(final) as part:
            yield part
    except (OSError, ValueError) as error:  # ValueError: Pillow, on sizes that a format can't hold
        raise _save_failed(final, getattr(error, "strerror", None) or str(error)) from error


def _started(command: list[str], complaints: IO[bytes], path: Path) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            [imageio_ffmpeg.get_ffmpeg_exe(), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            pass_fds=[int(word.removeprefix(_HANDLE)) for word in command if word.startswith(_HANDLE)],
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: imageio-ffmpeg found none at all
        log.error("ffmpeg can't be started: %s", error)
        raise _save_failed(path, "ffmpeg can't be started") from None


def _save_failed(path: Path, reason: str) -> EngineError:
    remedy = _REMEDIES.get(reason, "the log of the daemon says more")
    code = STORAGE_FAULT if reason in _STORAGE_REMEDIES else "save_failed"
    return EngineError(f"'{path.name}' could not be saved: {reason}; {remedy}", code)


def _comment_option(format: ImageFormat, comment: str) -> dict[str, Any]:
    """Pillow's option for `comment`, which each format has in another place."""
    if format == "png":
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", comment)  # the keyword that the PNG standard registers for free text
        return {"pnginfo": text}
    exif, data = Image.Exif(), comment.encode("ascii")
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: b"ASCII\0\0\0" + data}
    if format == "webp" or len(exif.tobytes()) <= _JPEG_SEGMENT_BYTES:
        return {"exif": exif}
    # Too long for JPEG's one EXIF segment: as many comment segments as it takes.
    chunks = [data[at : at + _JPEG_SEGMENT_BYTES] for at in range(0, len(data), _JPEG_SEGMENT_BYTES)]
    return {"extra": b"".join(b"\xff\xfe" + (len(chunk) + 2).to_bytes(2, "big") + chunk for chunk in chunks)}
