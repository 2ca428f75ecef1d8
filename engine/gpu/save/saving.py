"""Finished clips to files in the output folder: while one is encoded, the frames of the next are already made."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import datetime
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from PIL import Image

from engine import settings
from engine.files import media
from engine.files.place import Folder
from engine.files.publish import KEPT
from engine.files.thumbnails import PREVIEW_WIDTH, ThumbnailCache, key_of
from engine.gpu.run.results import Clip
from engine.gpu.save import encode
from engine.job import STORAGE_FAULT, EngineConfig, EngineError, Job, OutputFile

log = logging.getLogger("wangpd.worker")
T = TypeVar("T")
MOST_WAITING_BYTES = 2**30  # of frames that are made and not yet encoded
RGB = 3  # channels; a picture with an alpha channel has no poster: its viewer chooses the background
Settled = Callable[[BaseException | None], None]  # called for each `finish`, with the reason if a file is not written
Made = Callable[[int, OutputFile], None]  # called with the task's id for each whole file, in the same thread


class Saved(NamedTuple):
    """A file whose frames are all made; it is whole once `written` is done."""

    file: OutputFile
    written: "Future[None]"

    def require_well(self) -> None:
        """Raises what writing the file has raised, if it has."""
        if self.written.done():
            self.written.result()


class Saver:
    """Writes the files of a job into `KEPT`, and publishes each when it is whole, or leaves that to the daemon."""

    def __init__(self, config: EngineConfig, settled: Settled, made: Made) -> None:
        self._config, self._settled, self._made = config, settled, made
        self._kept = config.state_path / KEPT
        self._disk = Folder(config.save_path, "save_path", 0, "", mounted=config.save_mounted)
        self._finished = 0
        self._thread = ThreadPoolExecutor(1, "background")
        self._posters = ThumbnailCache(config.state_path / "thumbnails")

    def save(self, task_id: int, clip: Clip, job: Job, started: datetime) -> Saved:
        """Make the frames of `clip` and write them meanwhile; returns when the last one is made. Raises as `feed`."""
        kind = "audio" if clip.frames is None else "video" if job.frames > 1 else "image"
        config, layer = self._config, f"_{clip.layer}" if clip.layer else ""
        suffix = {"audio": config.audio_format, "video": "mp4", "image": config.image_format.replace("jpeg", "jpg")}
        ending = f"{layer}.{suffix[kind]}"
        name = encode.output_name(job, clip.seed, task_id, started, ending, instance=config.instance)
        height = width = count = 0

        def pieces() -> Iterator[torch.Tensor]:
            nonlocal height, width, count
            for piece in clip.frames or ():
                height, width = piece.shape[1:3]
                count += len(piece)
                yield piece

        def about(size_bytes: int) -> OutputFile:
            return OutputFile(name, kind, size_bytes, width, height, count, job.fps, clip.seed)

        def write(coming: Iterator[torch.Tensor]) -> None:
            whole = self._kept / name
            try:
                self._kept.mkdir(exist_ok=True)  # no parents: a state_path that is away is not made anew
                self._write(whole, kind, clip, job, coming)
                place = whole if whole.exists() else config.save_path / name  # the daemon may have published it already
                size_bytes = place.stat().st_size
            except (EngineError, OSError) as error:
                if isinstance(error, EngineError) and self._kept.is_dir():
                    raise
                sentence = f"'{name}' could not be saved: state_path can't be used; bring the folder back"
                raise EngineError(sentence, STORAGE_FAULT) from error
            self._made(task_id, about(size_bytes))  # first: of a process that is killed, nothing is visible but this
            self._disk.take(whole)  # or it is kept

        written = feed(self._thread, pieces(), write, lambda piece: piece.nbytes)
        return Saved(about(0), written)

    def finish(self, saved: Sequence[Saved]) -> int:
        """Have `settled` called once these files of a job are written; returns the number of that call, from 1."""

        def settle(_: Any) -> None:
            self._settled(next(filter(None, (file.written.exception() for file in saved)), None))

        self._finished += 1
        saved[-1].written.add_done_callback(settle)  # the last: they are done in order
        return self._finished

    def _write(self, path: Path, kind: str, clip: Clip, job: Job, pieces: Iterator[torch.Tensor]) -> None:
        config = self._config
        frames = (frame.numpy() for frame in chain.from_iterable(pieces))
        sound = None if clip.sound is None else encode.Sound(clip.sound.numpy(), clip.sample_rate)
        embedded = settings.echo(job, clip.seed) if config.embed_settings else None
        if kind == "video":
            first = next(frames)
            encode.write_video(
                path, chain([first], frames), job.fps, embedded,
                crf=config.video_crf, preset=config.video_preset, encoder=_encoder(config.video_encoder), sound=sound,
            )  # fmt: skip
        elif kind == "image":
            (first,) = frames
            encode.write_image(path, first, embedded, config.image_format)
        elif sound:
            encode.write_sound(path, sound, embedded)
        if kind != "audio" and first.shape[-1] == RGB:
            with suppress(OSError):  # it is published already
                key = key_of(path.name, path.stat(), PREVIEW_WIDTH)
                self._posters.put(key, media.reduced(Image.fromarray(first), PREVIEW_WIDTH))


@cache
def _encoder(wanted: str) -> str:
    """The configured encoder, or x264 where it does not work: that must not cost anybody a video."""
    if encode.works(wanted):
        return wanted
    log.warning("video_encoder '%s' does not work on this machine; x264 is used instead", wanted)
    return "x264"


class Broken(Exception):
    """The pieces of a file could not all be made."""


class _Handover(Generic[T]):
    """A queue of pieces from the thread that makes them to the one that writes them, limited in bytes."""

    def __init__(self, size_bytes: Callable[[T], int]) -> None:
        self._size_bytes = size_bytes
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._state = "open"  # then ended (complete), broken (the rest can't be made) or left (the writer has stopped)

    def put(self, piece: T) -> bool:
        """Add a piece, once those that wait leave room; False if the writer has stopped."""
        with self._changed:
            self._changed.wait_for(self._has_room)
            self._waiting.append(piece)
            self._changed.notify_all()
            return self._state != "left"

    def _has_room(self) -> bool:
        return self._state == "left" or sum(map(self._size_bytes, self._waiting)) < MOST_WAITING_BYTES

    def close(self, state: str) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def taken(self) -> Iterator[T]:
        """The pieces as they come. Raises Broken."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._state != "open")
                if self._state == "broken":
                    raise Broken
                if not self._waiting:
                    return
                piece = self._waiting.popleft()
                self._changed.notify_all()
            yield piece


def feed(
    thread: ThreadPoolExecutor, pieces: Iterable[T], write: Callable[[Iterator[T]], Any], size_bytes: Callable[[T], int]
) -> "Future[Any]":
    """Pass `pieces` to `write` in `thread`, each as soon as it is made; returns when the last one is made.

    Raises what making them or `write` raises, and then `write` has ended: with Broken, if making them failed.
    """
    handover = _Handover(size_bytes)
    written = thread.submit(write, handover.taken())
    written.add_done_callback(lambda _: handover.close("left"))
    try:
        for piece in pieces:
            if not handover.put(piece):
                written.result()
    except BaseException:
        handover.close("broken")
        wait([written])
        raise
    handover.close("ended")
    return written
