"""Where a model's weights lie: in the package, in `models_dir`, or in the Hugging Face cache."""

import os
from contextlib import suppress
from pathlib import Path

from engine.catalog import HERE, Model

INDEX = "model_index.json"  # the file that makes a folder a diffusers pipeline


def locate(model: Model, models_dir: Path) -> Path | None:
    """The folder that holds this model's weights, or None if they are not installed."""
    folders = [HERE / model.builtin] if model.builtin else [models_dir / model.id, *_cached(model)]
    return next((folder for folder in folders if (folder / INDEX).is_file()), None)


def install_command(model: Model, models_dir: Path) -> str:
    """The command that puts this model's weights where `locate` finds them."""
    return f"hf download {model.repo} --local-dir {models_dir / model.id}"


def hub_cache() -> Path:
    """The Hugging Face cache, by the variables that its own tools obey."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _cached(model: Model) -> list[Path]:
    """The snapshot that the cache's own `refs` file names. (Reading it here spares the daemon the hub's library.)"""
    repo = hub_cache() / ("models--" + model.repo.replace("/", "--"))
    revision = model.revision or "main"
    ref = repo / "refs" / revision
    with suppress(OSError):  # a revision that is a commit has no ref: its snapshot carries its name
        revision = ref.read_text().strip()
    return [repo / "snapshots" / revision]


def download(model: Model, models_dir: Path) -> Path:
    """Fetch the weights from the hub into `models_dir`, safetensors only, and return their folder.

    Raises OSError, or an error of the hub's library that says what failed. It may take hours.
    """
    from huggingface_hub import snapshot_download  # only here: the daemon must not carry it

    folder = models_dir / model.id
    part = models_dir / f".{model.id}.part"  # a broken download goes on from here, and never looks installed
    unwanted = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pickle", "*.onnx", "*.msgpack"]
    snapshot_download(model.repo, revision=model.revision, local_dir=part, ignore_patterns=unwanted)
    part.rename(folder)
    return folder
