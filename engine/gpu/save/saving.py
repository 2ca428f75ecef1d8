"""Finished clips to files in the output folder, encoded in the background."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from engine import settings
from engine.files import media
from engine.files.thumbnails import PREVIEW_WIDTH, ThumbnailCache
from engine.gpu.run.results import Clip
from engine.gpu.save import background, encode
from engine.job import EngineConfig, Job, OutputFile

log = logging.getLogger("wangpd.worker")
RGB = 3  # channels; a picture with an alpha channel has no poster: its viewer chooses the background
IMAGE_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


@dataclass
class _File:
    """A file to write, and what is known of its frames once they are made."""

    path: Path
    kind: str  # video, image, audio
    clip: Clip
    job: Job
    settings: Mapping[str, Any] | None
    first: encode.Pixels | None = None
    count: int = 0  # frames that were made

    def pieces(self) -> Iterator[torch.Tensor]:
        for piece in self.clip.frames or ():
            if self.first is None:
                self.first = piece[0].numpy()
            self.count += len(piece)
            yield piece

    def described(self) -> OutputFile:
        """The file as the daemon knows it, but for its size."""
        height, width = (0, 0) if self.first is None else self.first.shape[:2]
        return OutputFile(self.path.name, self.kind, 0, width, height, self.count, self.job.fps, self.clip.seed)


@dataclass(frozen=True)
class Saved:
    """A file whose frames are all made; it is whole once `written` is done."""

    file: OutputFile
    written: "Future[None]"

    def require_well(self) -> None:
        """Raises what writing the file has raised, if it has."""
        if self.written.done():
            self.written.result()


class Saver:
    """Writes the files of a job; each is visible in the output folder only when it is whole."""

    def __init__(self, config: EngineConfig, settled: Callable[[str], None]) -> None:
        """`settled` is called for each `finish`, with the reason if a file could not be written."""
        self._config, self._settled = config, settled
        self._finished = 0
        self._thread = ThreadPoolExecutor(1, "background")
        self._posters = ThumbnailCache(config.state_path / "thumbnails")

    def save(self, task_id: int, clip: Clip, job: Job, started: datetime) -> Saved:
        """Make the frames of `clip` and write them meanwhile; returns when the last one is made.

        Raises what making them raises, and then there is no file; or EngineError if it can't be written.
        """
        kind = "audio" if clip.frames is None else "video" if job.frames > 1 else "image"
        config, layer = self._config, f"_{clip.layer}" if clip.layer else ""
        suffix = {"audio": f".{config.audio_format}", "video": ".mp4", "image": IMAGE_SUFFIXES[config.image_format]}
        path = config.save_path / encode.output_name(job, clip.seed, task_id, started, layer + suffix[kind])
        embedded = settings.echo(job, clip.seed) if config.embed_settings else None
        file = _File(path, kind, clip, job, embedded)
        written = background.feed(self._thread, file.pieces(), partial(self._write, file), lambda piece: piece.nbytes)
        return Saved(file.described(), written)

    def finish(self, saved: Sequence[Saved]) -> int:
        """Have `settled` called once these files of a job are written; returns the number of that call, from 1."""
        self._finished += 1
        saved[-1].written.add_done_callback(lambda _: self._settled(_fault(saved)))  # the last: they are done in order
        return self._finished

    def _write(self, file: _File, pieces: Iterator[torch.Tensor]) -> None:
        config, clip = self._config, file.clip
        frames = (frame.numpy() for frame in chain.from_iterable(pieces))
        sound = None if clip.sound is None else encode.Sound(clip.sound.numpy(), clip.sample_rate)
        if file.kind == "video":
            encode.write_video(
                file.path, frames, file.job.fps, file.settings,
                crf=config.video_crf, preset=config.video_preset, encoder=_encoder(config.video_encoder), sound=sound,
            )  # fmt: skip
        elif file.kind == "image":
            (frame,) = frames
            encode.write_image(file.path, frame, file.settings, config.image_format)
        elif sound:
            encode.write_sound(file.path, sound, file.settings)
        if file.first is not None and file.first.shape[-1] == RGB:
            self._posters.put_poster(file.path, media.reduced(Image.fromarray(file.first), PREVIEW_WIDTH))


def _fault(saved: Sequence[Saved]) -> str:
    """Why one of these files could not be written; empty if all are."""
    return next((str(error) for file in saved if (error := file.written.exception())), "")


@cache
def _encoder(wanted: str) -> str:
    """The configured encoder, or x264 where it does not work: that must not cost anybody a video."""
    if encode.works(wanted):
        return wanted
    log.warning("video_encoder '%s' does not work on this machine; x264 is used instead", wanted)
    return "x264"
