"""Where a model's weights lie: in the package, in `models_dir`, or in the Hugging Face cache."""

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.catalog import HERE, Model

INDEX = "model_index.json"  # the file that makes a folder a diffusers pipeline
UNWANTED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pickle", "*.onnx", "*.msgpack"]  # pickles could run code


@dataclass(frozen=True)
class Weights:
    """A diffusers folder, and the LoRA files of the model's recipe in its order."""

    folder: Path
    loras: tuple[Path, ...] = ()


def locate(model: Model, models_dir: Path) -> Weights | None:
    """Where this model's weights are, or None if they are not all installed."""
    folder = next(filter(is_whole, _folders(model, models_dir)), None)
    loras = [_lora(lora, models_dir / model.id / "loras") for lora in model.recipe_loras]
    found = tuple(path for path in loras if path)
    return Weights(folder, found) if folder and len(found) == len(loras) else None


def install_command(model: Model, models_dir: Path) -> str:
    """The command that puts this model's weights where `locate` finds them."""
    revision = ("--revision", model.revision) if model.revision else ()
    downloads = [(model.repo, *revision, "--local-dir", models_dir / (model.base or model.id))]
    for lora in model.recipe_loras:
        downloads.append((lora["repo"], lora["file"], "--local-dir", models_dir / model.id / "loras"))
    return " && ".join(shlex.join(map(str, ("hf", "download", *words))) for words in downloads)


def is_whole(folder: Path) -> bool:
    """Whether every part that the folder's index names is there with all its weights; a broken download's are not."""
    try:
        parts = json.loads((folder / INDEX).read_text())
        named = [name for name, about in parts.items() if isinstance(about, list) and about[0]]
        return all(_part_is_whole(folder / name) for name in named)
    except (OSError, ValueError):  # ValueError: a file that was cut off
        return False


def _part_is_whole(part: Path) -> bool:
    indexes = [json.loads(path.read_text()) for path in part.glob("*.safetensors.index*.json")]
    shards = {shard for index in indexes for shard in index["weight_map"].values()}
    if not shards:  # one file, or none at all: a scheduler or a tokenizer
        shards = {"*.safetensors" if (part / "config.json").is_file() else "*"}
    return all(any(path.is_file() for path in part.glob(shard)) for shard in shards)


def download(model: Model, models_dir: Path) -> Weights:
    """Fetch from the hub what is not here, safetensors only, and return where it lies.

    Raises OSError, or an error of the hub's library that says what failed. It may take hours, and goes on where it was
    broken off: until it is whole, it never looks installed.
    """
    from huggingface_hub import hf_hub_download, snapshot_download  # only here: the daemon must not carry it

    folder = models_dir / (model.base or model.id)
    if not any(map(is_whole, _folders(model, models_dir))):
        part = models_dir / f".{folder.name}.part"
        snapshot_download(model.repo, revision=model.revision, local_dir=part, ignore_patterns=UNWANTED)
        part.rename(folder)
    for lora in model.recipe_loras:
        hf_hub_download(lora["repo"], lora["file"], local_dir=models_dir / model.id / "loras")
    found = locate(model, models_dir)
    if found is None:
        raise OSError(f"the hub's {model.repo} holds no {INDEX}: it is not in diffusers layout")
    return found


def _folders(model: Model, models_dir: Path) -> Iterator[Path]:
    if model.builtin:
        yield HERE / model.builtin
        return
    yield models_dir / model.id
    if model.base:
        yield models_dir / model.base
    yield _snapshot(model.repo, model.revision or "main")


def _lora(lora: Mapping[str, Any], folder: Path) -> Path | None:
    name = Path(lora["file"])
    places = (folder / name, folder / name.name, _snapshot(lora["repo"], "main") / name)
    return next((place for place in places if place.is_file()), None)


def _snapshot(repo: str, revision: str) -> Path:
    """The cache's folder of a repository. (Reading its `refs` file here spares the daemon the hub's library.)"""
    cached = hub_cache() / ("models--" + repo.replace("/", "--"))
    with suppress(OSError):  # a revision that is a commit has no ref: its snapshot carries its name
        revision = (cached / "refs" / revision).read_text().strip()
    return cached / "snapshots" / revision


def hub_cache() -> Path:
    """The Hugging Face cache, by the variables that its own tools obey."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
