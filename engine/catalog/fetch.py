"""Fetches the missing files of a model from the Hugging Face hub; each resumes where it stopped.

`engine.catalog.download` runs it in a process of its own: the hub's client is too heavy for the daemon.
`snapshot_download` and `hf_hub_download` do not resume: each call starts a new temporary file at byte 0, and leaves it
behind when it is killed (huggingface_hub 2.4). The `http_get` beneath them appends to a file.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers

from engine.catalog import weights
from engine.catalog.download import Message
from engine.catalog.models import Catalog, Model
from engine.catalog.weights import Source, Weights
from engine.job import EngineError

Report = Callable[[Message], None]


MAX_INDEX_BYTES = 2**20
_SEGMENT = re.compile(r"(?!\.\.?$)[^/\\:\x00-\x1f\x7f]{1,200}")  # of a name, on any system


class FetchError(EngineError):
    """Why the weights could not be fetched."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub that is needed. `etag` is the SHA-256 of a file in LFS, as weights are, else git's id."""

    repo: str
    commit: str
    name: str
    target: Path
    size_bytes: int
    etag: str

    def require_safe(self, models_dir: Path) -> None:
        """Raises FetchError for a name that leads out of the model's folder, and for a size that can't be true."""
        safe = all(map(_SEGMENT.fullmatch, self.name.split("/"))) and type(self.size_bytes) is int
        if safe and self.size_bytes >= 0:
            own = models_dir / self.target.relative_to(models_dir).parts[0]  # which may be a link of its owner's
            if self.target.parent.resolve().is_relative_to(own.resolve()):
                return
        reason = f"lists the file {self.name[:100]!r} outside the model's folder, or with no true size"
        raise FetchError(f"the hub's {self.repo} {reason}; nothing was fetched", "unsafe")

    @property
    def part(self) -> Path:
        """Where it grows. The name depends on the content, so that a newer version does not resume an older one."""
        return self.target.with_name(f"{self.target.name}.{self.etag[:12]}.incomplete")

    @property
    def is_here(self) -> bool:
        return self.target.is_file() and self.target.stat().st_size == self.size_bytes

    @property
    def bytes_here(self) -> int:
        """How many of its bytes need not be fetched."""
        place = self.target if self.is_here else self.part
        return min(place.stat().st_size, self.size_bytes) if place.is_file() else 0

    def fetch(self, grown: Callable[[], None]) -> None:
        """Fetch the rest, verify the content and publish it by rename. Calls `grown` after each chunk."""
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with _translated(self.repo), _Part(io.FileIO(self.part, "ab"), self.size_bytes, grown) as part:
            if part.tell() > self.size_bytes:
                part.seek(part.truncate(0))
            url = hf_hub_url(self.repo, self.name, revision=self.commit)
            http_get(url, part, resume_size=part.tell(), headers=build_hf_headers(), expected_size=self.size_bytes)
            os.fsync(part.fileno())
        with self.part.open("rb") as whole:
            if len(self.etag) == 64 and hashlib.file_digest(whole, "sha256").hexdigest() != self.etag:
                self.part.unlink()
                raise FetchError(f"{self.repo}: {self.name} arrived damaged and was removed; try again", "damaged")
        self.part.replace(self.target)


class _Part(io.BufferedWriter):
    """A file that grows to `most_bytes`, else ValueError. Calls `grown` once it has its new size, after each chunk."""

    def __init__(self, raw: Any, most_bytes: int, grown: Callable[[], None] = lambda: None) -> None:
        super().__init__(raw)
        self._most_bytes, self._grown = most_bytes, grown

    def write(self, chunk: Any, /) -> int:
        if self.tell() + len(chunk) > self._most_bytes:
            raise ValueError(f"the hub sends more than the {self._most_bytes} bytes that the file may have")
        size_bytes = super().write(chunk)
        self.flush()
        self._grown()
        return size_bytes


def fetch(
    model: Model, models_dir: Path, reserve_bytes: int = 0, report: Report = lambda _: None, wait: bool = False
) -> Weights:
    """Fetch what is missing, safetensors only, and return where all of the model's weights are. Raises FetchError.

    Before the first byte, the disk must have room for all files and `reserve_bytes` more. If another process is
    fetching the model, `wait` for that one. `report` gets the progress over all files after each chunk.
    """
    with _translated(model.repo):
        models_dir.mkdir(parents=True, exist_ok=True)
        # Two processes must not write the same file. The kernel releases the lock however the process ends.
        with (models_dir / f".{model.base or model.id}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FetchError(f"model '{model.id}' is being downloaded by another process already", "busy") from None
            files = [file for source in weights.missing(model, models_dir) for file in _remote_files(source)]
            for file in files:
                file.require_safe(models_dir)
            _require_room(files, models_dir, reserve_bytes)
            total_bytes = sum(file.size_bytes for file in files)

            def progress(name: str) -> None:
                done_bytes = sum(file.bytes_here for file in files)
                report({"done_bytes": done_bytes, "total_bytes": total_bytes, "file": name})

            progress("")
            for file in files:
                if not file.is_here:
                    file.fetch(partial(progress, file.name))
    if found := weights.locate(model, models_dir):
        return found
    raise FetchError(f"model '{model.id}' is not complete: {weights.remedy(model, models_dir)}", "incomplete")


def _remote_files(source: Source) -> list[RemoteFile]:
    def read(name: str) -> str:
        buffer = io.BytesIO()
        url, part = hf_hub_url(source.repo, name, revision=info.sha), _Part(buffer, MAX_INDEX_BYTES)
        http_get(url, part, headers=build_hf_headers())
        return buffer.getvalue().decode()

    with _translated(source.repo):
        info: Any = HfApi().model_info(source.repo, revision=source.revision, files_metadata=True)
        there = {str(PurePosixPath(entry.rfilename)): entry for entry in info.siblings}
        targets = source.pick(list(there), read)
    etags = {name: str(there[name].lfs.sha256 if there[name].lfs else there[name].blob_id) for name in targets}
    return [
        RemoteFile(source.repo, info.sha, there[name].rfilename, targets[name], there[name].size, etags[name])
        for name in targets
    ]


def _require_room(files: Sequence[RemoteFile], models_dir: Path, reserve_bytes: int) -> None:
    needed = sum(file.size_bytes - file.bytes_here for file in files)
    free = shutil.disk_usage(models_dir).free
    if needed + reserve_bytes > free:
        raise FetchError(
            f"models_dir: {needed / 1e9:.1f} GB are still to be fetched and {reserve_bytes / 1e9:.1f} GB kept free"
            f" (min_free_mb), but {models_dir} has {free / 1e9:.1f} GB free; make room or move models_dir",
            "disk_full",
        )


_RESUMES = "try again: the download resumes where it stopped"
# What the hub's client or the disk raises, the most specific first: its code, and the sentence for people.
_SENTENCES: Sequence[tuple[type[Exception], str, str]] = (
    (errors.OfflineModeIsEnabled, "offline", "HF_HUB_OFFLINE is set, so nothing is fetched; unset it for wangpd"),
    (errors.GatedRepoError, "gated", "the hub wants the licence of {repo} accepted first, on its page; set HF_TOKEN"),
    (errors.RepositoryNotFoundError, "not_found", "the hub has no {repo}, or shows it only to those with an HF_TOKEN"),
    (errors.RevisionNotFoundError, "not_found", "the hub's {repo} has no such revision; {reason}"),
    (errors.HfHubHTTPError, "hub_fault", f"the hub can't give {{repo}} now: {{reason}}; {_RESUMES}"),
    (httpx2.HTTPError, "unreachable", f"the hub at {{endpoint}} can't be reached: {{reason}}; {_RESUMES}"),
    (OSError, "os_error", f"{{repo}}: {{reason}}; {_RESUMES}"),
    (ValueError, "unusable", "{reason}"),
)


@contextmanager
def _translated(repo: str) -> Iterator[None]:
    """Whatever the hub's client or the disk raises in the block becomes a FetchError."""
    try:
        yield
    except (OSError, ValueError, httpx2.HTTPError) as error:
        code, sentence = next((code, sentence) for kind, code, sentence in _SENTENCES if isinstance(error, kind))
        lines = str(error).strip().splitlines() or [type(error).__name__]
        message = sentence.format(repo=repo, reason=lines[0][:300], endpoint=constants.ENDPOINT)
        raise FetchError(message, code) from error


def main(models_dir: str, model_id: str, reserve_bytes: str) -> int:
    """Fetch, and print a Message a line. Returns the exit code."""
    threading.Thread(target=_exit_with_parent, name="watchdog", daemon=True).start()
    try:
        fetch(Catalog.load(Path(models_dir)).get(model_id), Path(models_dir), int(reserve_bytes), _print)
    except FetchError as error:
        _print({"error": {"code": error.code, "message": str(error)}})
        return 1
    return 0


def _exit_with_parent() -> None:
    """Exit once the parent, which holds the other end of the standard input, is gone."""
    os.read(sys.stdin.fileno(), 1)  # not by way of `sys.stdin`, whose lock the end of the interpreter would wait for
    os._exit(1)


def _print(message: Message) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
