"""Fetch what is missing of a model from the Hugging Face hub, each file going on where it was broken off.

The hub's client is too heavy for the daemon: `engine.downloads` runs this module in a process of its own and reads its
JSON lines; the worker, which carries the client anyway, calls `fetch`.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers

from engine.catalog import weights
from engine.catalog.models import Catalog, Model
from engine.catalog.weights import Source, Weights

# Told after every piece of a file: the bytes that are here, the bytes of all files, and the file that is being fetched.
Report = Callable[[int, int, str], None]


class FetchError(Exception):
    """Why the weights could not be fetched: a sentence for people, and a code for programs."""

    def __init__(self, sentence: str, code: str) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class RemoteFile:
    """A file of the hub that is needed. `digest` is the SHA-256 of one that is stored outside git, as weights are."""

    repo: str
    commit: str
    name: str
    target: Path
    size_bytes: int
    tag: str
    digest: str | None

    @property
    def part(self) -> Path:
        """Where it grows. The name tells its content, so that a newer version never goes on in an older one."""
        return self.target.with_name(f"{self.target.name}.{self.tag[:12]}.incomplete")

    @property
    def is_here(self) -> bool:
        """It lies where it belongs. It is renamed to there only when it is whole."""
        return self.target.is_file() and self.target.stat().st_size == self.size_bytes

    @property
    def bytes_here(self) -> int:
        """How much of it needs no fetching any more."""
        if self.is_here:
            return self.size_bytes
        return min(self.part.stat().st_size, self.size_bytes) if self.part.is_file() else 0


def fetch(
    model: Model,
    models_dir: Path,
    reserve_bytes: int = 0,
    report: Report = lambda *_: None,
    wait: bool = False,
) -> Weights:
    """Fetch from the hub what is not here, safetensors only, and return where everything lies.

    Before the first byte, the disk must have room for all of it and `reserve_bytes` more. It may take hours, and goes
    on where it was broken off: until it is whole, it never looks installed. If another process fetches it already,
    `wait` for that one. Raises FetchError.
    """
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with _alone(model, models_dir, wait):
            files = [file for source in weights.missing(model, models_dir) for file in _listed(source)]
            _require_room(files, models_dir, reserve_bytes)
            _get_all(files, report)
    except OSError as error:  # of the folder itself
        raise _explained(error, model.repo) from error
    found = weights.locate(model, models_dir)
    if found is None:
        raise FetchError(f"model '{model.id}' is not complete: {weights.remedy(model, models_dir)}", "incomplete")
    return found


@contextmanager
def _alone(model: Model, models_dir: Path, wait: bool) -> Iterator[None]:
    """Hold the model's folder: two that write the same file would spoil it."""
    with (models_dir / f".{model.base or model.id}.lock").open("a") as lock:
        how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.flock(lock, how)  # the kernel gives it back however the process ends
        except BlockingIOError:
            raise FetchError(f"model '{model.id}' is being downloaded by another process already", "busy") from None
        yield


def _listed(source: Source) -> list[RemoteFile]:
    """The files that the source picks out of its repository."""
    with _explaining(source.repo):
        info = HfApi().model_info(source.repo, revision=source.revision, files_metadata=True)
        commit, there = info.sha or source.revision, {entry.rfilename: entry for entry in info.siblings or ()}
        targets = source.pick(there, lambda name: _text(source.repo, commit, name))
    return [_remote(source.repo, commit, there[name], target) for name, target in targets.items()]


def _remote(repo: str, commit: str, entry: Any, target: Path) -> RemoteFile:
    digest = entry.lfs.sha256 if entry.lfs else None
    return RemoteFile(repo, commit, entry.rfilename, target, entry.size, digest or entry.blob_id, digest)


def _text(repo: str, commit: str, name: str) -> str:
    buffer = io.BytesIO()
    http_get(hf_hub_url(repo, name, revision=commit), buffer, headers=build_hf_headers())
    return buffer.getvalue().decode()


def _require_room(files: Sequence[RemoteFile], models_dir: Path, reserve_bytes: int) -> None:
    needed = sum(file.size_bytes - file.bytes_here for file in files)
    free = shutil.disk_usage(models_dir).free
    if needed + reserve_bytes > free:
        raise FetchError(
            f"models_dir: {needed / 1e9:.1f} GB are still to be fetched and {reserve_bytes / 1e9:.1f} GB kept free"
            f" (min_free_mb), but {models_dir} has {free / 1e9:.1f} GB free; make room or move models_dir",
            "disk_full",
        )


def _get_all(files: Sequence[RemoteFile], report: Report) -> None:
    total = sum(file.size_bytes for file in files)
    here = sum(file.bytes_here for file in files)
    report(here, total, "")
    for file in files:
        if not file.is_here:
            before = here - file.bytes_here
            _get(file, partial(_report_whole, report, before, total, file.name))
            here = before + file.size_bytes


def _report_whole(report: Report, before: int, total: int, name: str, done: int) -> None:
    report(before + done, total, name)


class _Growing(io.FileIO):
    """The part of a file that is here; tells after each piece how long it is."""

    def __init__(self, path: Path, grown: Callable[[int], None]) -> None:
        super().__init__(path, "ab")
        self._grown = grown

    def write(self, piece: Any, /) -> int:
        """All of `piece`, which FileIO alone does not promise."""
        rest = memoryview(piece)
        while rest:
            rest = rest[super().write(rest) :]
        self._grown(self.tell())
        return len(piece)


def _get(file: RemoteFile, grown: Callable[[int], None]) -> None:
    """Fetch what lacks of one file and publish it by rename."""
    file.part.parent.mkdir(parents=True, exist_ok=True)
    with _explaining(file.repo), _Growing(file.part, grown) as part:
        if part.tell() > file.size_bytes:
            part.truncate(0)
        url = hf_hub_url(file.repo, file.name, revision=file.commit)
        headers = build_hf_headers()
        http_get(url, part, resume_size=part.tell(), headers=headers, expected_size=file.size_bytes)
        os.fsync(part.fileno())
    _require_content(file)
    file.part.replace(file.target)


def _require_content(file: RemoteFile) -> None:
    """Raises FetchError, and removes the part, if what came is not what the hub said it would be."""
    if file.digest is None:
        return
    with file.part.open("rb") as part:
        found = hashlib.file_digest(part, "sha256").hexdigest()
    if found != file.digest:
        file.part.unlink()
        raise FetchError(f"{file.repo}: {file.name} arrived damaged and was removed; download it again", "damaged")


_AGAIN = "ask again, it goes on where it stopped"
# What the hub's client or the disk raised, best first: its code, and the sentence for people.
_SENTENCES: Sequence[tuple[type[Exception], str, str]] = (
    (OfflineModeIsEnabled, "offline", "HF_HUB_OFFLINE is set, so nothing is fetched; unset it where wangpd starts"),
    (
        GatedRepoError,
        "gated",
        "the hub wants the licence of {repo} accepted first; do so on its page there, and set HF_TOKEN where wangpd"
        " starts",
    ),
    (RepositoryNotFoundError, "not_found", "the hub has no {repo}, or shows it only to those with the right HF_TOKEN"),
    (RevisionNotFoundError, "not_found", "the hub's {repo} has no such revision; {reason}"),
    (HfHubHTTPError, "hub_fault", f"the hub can't give {{repo}} now: {{reason}}; {_AGAIN}"),
    (httpx2.HTTPError, "unreachable", f"the hub at {{endpoint}} can't be reached: {{reason}}; {_AGAIN}"),
    (OSError, "os_error", f"{{repo}}: {{reason}}; {_AGAIN}"),
    (ValueError, "unusable", "{reason}"),
)


@contextmanager
def _explaining(repo: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise _explained(error, repo) from error


def _explained(error: Exception, repo: str) -> FetchError:
    code, sentence = next((code, sentence) for kind, code, sentence in _SENTENCES if isinstance(error, kind))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return FetchError(sentence.format(repo=repo, reason=lines[0][:300], endpoint=constants.ENDPOINT), code)


def main(arguments: Sequence[str]) -> int:
    """`MODELS_DIR ID RESERVE_BYTES`: fetch, and write a JSON object a line; the last one of a failure has `error`."""
    models_dir, model_id, reserve_bytes = arguments
    threading.Thread(target=_end_with_parent, name="watchdog", daemon=True).start()
    folder = Path(models_dir)
    try:
        fetch(Catalog.load(folder).get(model_id), folder, int(reserve_bytes), _tell_progress)
    except FetchError as error:
        _tell({"error": {"code": error.code, "message": str(error)}})
        return 1
    return 0


def _end_with_parent() -> None:
    """The parent holds the other end of the input: once it is gone, nobody wants these files any more."""
    os.read(sys.stdin.fileno(), 1)  # not by way of `sys.stdin`, whose lock the end of the interpreter would wait for
    os._exit(1)


def _tell_progress(done: int, total: int, name: str) -> None:
    _tell({"done_bytes": done, "total_bytes": total, "file": name})


def _tell(message: Mapping[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
