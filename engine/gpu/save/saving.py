"""Finished clips to files in the output folder, encoded in the background."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from engine import settings
from engine.files import media
from engine.files.thumbnails import PREVIEW_WIDTH, ThumbnailCache
from engine.gpu.run.results import Clip
from engine.gpu.save import encode
from engine.gpu.save.background import Background
from engine.job import EngineConfig, Job, OutputFile

log = logging.getLogger("wangpd.worker")
RGB = 3  # channels; a picture with an alpha channel is laid on a ground by whoever shows it
IMAGE_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
Pieces = Iterator[torch.Tensor]


@dataclass
class _File:
    """A file to be: what goes into it, and what is known of it by and by."""

    path: Path
    kind: str  # video, image, audio
    clip: Clip
    job: Job
    settings: Mapping[str, Any] | None
    first: encode.Pixels | None = None
    count: int = 0  # frames that were made

    def pieces(self) -> Pieces:
        """The pieces of the clip, their frames counted."""
        for piece in self.clip.frames or ():
            if self.first is None:
                self.first = piece[0].numpy()
            self.count += len(piece)
            yield piece

    def told(self) -> OutputFile:
        """The file as the daemon knows it, but for its size."""
        height, width = (0, 0) if self.first is None else self.first.shape[:2]
        return OutputFile(self.path.name, self.kind, 0, width, height, self.count, self.job.fps, self.clip.seed)


@dataclass(frozen=True)
class Saved:
    """A file whose frames are all made; it is whole once `written` is done."""

    file: OutputFile
    written: "Future[None]"

    def require_well(self) -> None:
        """Raises what the writing has failed with, if it has."""
        if self.written.done():
            self.written.result()


class Saver:
    """Writes the files of a job; each is seen in the output folder only when it is whole."""

    def __init__(self, config: EngineConfig, settled: Callable[[str], None]) -> None:
        """`settled` is called for each `finish`, with the reason if a file could not be written."""
        self._config, self._settled = config, settled
        self._finished = 0
        self._background = Background()
        self._posters = ThumbnailCache(config.state_path / "thumbnails")

    def save(self, task_id: int, clip: Clip, job: Job, started: datetime) -> Saved:
        """Make the frames of `clip` and write them meanwhile; returns when the last one is made.

        Raises what the making raises, and then there is no file; or EngineError if it can't be written.
        """
        kind = "audio" if clip.frames is None else "video" if job.frames > 1 else "image"
        suffix = f"_{clip.layer}{self._suffix(kind)}" if clip.layer else self._suffix(kind)
        path = self._config.save_path / encode.output_name(job, clip.seed, task_id, started, suffix)
        embedded = settings.echo(job, clip.seed) if self._config.embed_settings else None
        file = _File(path, kind, clip, job, embedded)
        written = self._background.feed(
            file.pieces(), lambda pieces: self._write(file, pieces), lambda piece: piece.nbytes
        )
        return Saved(file.told(), written)

    def finish(self, saved: Sequence[Saved]) -> int:
        """Let `settled` be called once these files of a job are written; returns which of its calls that will be."""
        self._finished += 1
        saved[-1].written.add_done_callback(lambda _: self._settled(_fault(saved)))  # the last: they are done in order
        return self._finished

    def _suffix(self, kind: str) -> str:
        suffixes = {"video": ".mp4", "image": IMAGE_SUFFIXES[self._config.image_format]}
        return suffixes.get(kind, f".{self._config.audio_format}")

    def _write(self, file: _File, pieces: Pieces) -> None:
        _WRITERS[file.kind](file, pieces, self._config)
        if file.first is not None and file.first.shape[-1] == RGB:
            poster = media.reduced(Image.fromarray(file.first), PREVIEW_WIDTH)
            self._posters.put_poster(file.path, poster)


def _fault(saved: Sequence[Saved]) -> str:
    """Why one of these files could not be written; empty if all are."""
    errors = (file.written.exception() for file in saved)
    return next((str(error) for error in errors if error), "")


def _frames(pieces: Pieces) -> Iterator[encode.Pixels]:
    return (frame.numpy() for frame in chain.from_iterable(pieces))


def _write_video(file: _File, pieces: Pieces, config: EngineConfig) -> None:
    encode.write_video(
        file.path,
        _frames(pieces),
        file.job.fps,
        file.settings,
        crf=config.video_crf,
        preset=config.video_preset,
        encoder=_encoder(config.video_encoder),
        sound=None if file.clip.sound is None else _sound(file.clip),
    )


@cache
def _encoder(wanted: str) -> str:
    """The configured one, or x264 where that does not work: nobody shall lose a video over it."""
    if encode.works(wanted):
        return wanted
    log.warning("video_encoder '%s' does not work on this machine; x264 is used instead", wanted)
    return "x264"


def _write_image(file: _File, pieces: Pieces, config: EngineConfig) -> None:
    (frame,) = _frames(pieces)
    encode.write_image(file.path, frame, file.settings, config.image_format)


def _write_sound(file: _File, _pieces: Pieces, _config: EngineConfig) -> None:
    encode.write_sound(file.path, _sound(file.clip), file.settings)


def _sound(clip: Clip) -> encode.Sound:
    assert clip.sound is not None
    return encode.Sound(clip.sound.numpy(), clip.sample_rate)


_WRITERS: Mapping[str, Callable[[_File, Pieces, EngineConfig], None]] = {
    "video": _write_video,
    "image": _write_image,
    "audio": _write_sound,
}
