"""Where a model's weights lie: in the package, in `models_dir`, or in the Hugging Face cache; and what is missing."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from engine.catalog.models import PACKAGE, Model

INDEX = "model_index.json"  # the file that makes a folder a diffusers pipeline
DENOISER = frozenset({"transformer", "unet"})  # the component that a file without a name of its own replaces
# Components that only prepare or schedule: their folder may lie among weights that are not theirs.
_WITHOUT_WEIGHTS = ("tokenizer", "feature_extractor", "image_processor", "processor", "scheduler")
# What stands beside the weights. Never pickles or a repository's Python: both could run code.
_SMALL = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".yaml"})
_TENSORS = r"(?:diffusion_pytorch_model|pytorch_model|model)"  # as the two libraries name what they load
_SHARD = r"(?:-\d{5}-of-\d{5})?"


@dataclass(frozen=True)
class Weights:
    """A diffusers folder, and what is put on top of it.

    `loras` are the files of the model's recipe in its order; `parts` the folders of components that come from other
    repositories; `files` the single files that components come from, the one under "" holding the denoiser or all.
    """

    folder: Path
    loras: tuple[Path, ...] = ()
    parts: Mapping[str, Path] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)


def locate(model: Model, models_dir: Path) -> Weights | None:
    """Where this model's weights are, or None if they are not all installed."""
    folder = _folder(model, models_dir)
    loras = [_lora(lora, models_dir / model.id / "loras") for lora in model.recipe_loras]
    found = tuple(path for path in loras if path)
    parts = {name: _part(model, name, models_dir) for name in model.extra_repos}
    whole = {name: path for name, path in parts.items() if path}
    complete = len(found) == len(loras) and len(whole) == len(parts) and not absent_files(model, models_dir)
    return Weights(folder, found, whole, single_files(model, models_dir)) if folder and complete else None


def single_files(model: Model, models_dir: Path) -> dict[str, Path]:
    """Component → the file that its weights come from; "" is the denoiser, or a whole checkpoint."""
    return {name: models_dir / file for name, file in model.files.items() if file}


def absent_files(model: Model, models_dir: Path) -> list[Path]:
    """The single files that the model's entry names and that are not there. Nobody but the user has them."""
    return [path for path in single_files(model, models_dir).values() if not path.is_file()]


def remedy(model: Model, models_dir: Path) -> str:
    """What puts this model's weights where `locate` finds them, as the end of a sentence."""
    absent = absent_files(model, models_dir)
    if absent:
        return f"its entry names the file {absent[0]}, which is not there; put it there"
    return f"install it with: wangpd models download {model.id}"


def is_whole(folder: Path, given: frozenset[str] = frozenset(), bare: frozenset[str] = frozenset()) -> bool:
    """Whether every part that the folder's index names is there with all its weights; a broken download's are not.

    `given` components come from elsewhere; of `bare` ones only the configuration is needed.
    """
    try:
        named = named_parts(json.loads((folder / INDEX).read_text()))
        if not (folder / "scheduler").exists():  # a class with a schedule of its own names it and saves none
            given |= {"scheduler"}
        return all(_part_is_whole(folder / name, name, name in bare) for name in named if name not in given)
    except (OSError, ValueError):  # ValueError: a file that was cut off
        return False


def named_parts(index: Mapping[str, Any]) -> list[str]:
    """The components that an index names and that are not left out. A list of numbers is a setting, no component."""
    return [name for name, about in index.items() if isinstance(about, list) and about and isinstance(about[0], str)]


def _part_is_whole(part: Path, name: str, bare: bool = False) -> bool:
    if bare:
        return (part / "config.json").is_file()
    if not has_weights(name):
        return any(path.is_file() for path in part.glob("*"))
    indexes = [json.loads(path.read_text()) for path in part.glob("*.safetensors.index*.json")]
    shards = {shard for index in indexes for shard in index["weight_map"].values()}
    if not shards:  # one file, or none at all, as of a guider
        shards = {"*.safetensors" if (part / "config.json").is_file() else "*"}
    return all(any(path.is_file() for path in part.glob(shard)) for shard in shards)


def has_weights(component: str) -> bool:
    """False for a component that only prepares or schedules."""
    return not component.startswith(_WITHOUT_WEIGHTS)


# ---------------------------------------------------------------------------------------------------- what is missing


class Source(Protocol):
    """A repository of the hub, and which of its files are needed where."""

    @property
    def repo(self) -> str: ...

    @property
    def revision(self) -> str: ...

    def pick(self, names: Iterable[str], read: Callable[[str], str], /) -> dict[str, Path]:
        """Of the files that are there, those that are needed, and where each goes. `read` gives the text of one.

        Raises ValueError if the repository is not laid out as it should be.
        """


@dataclass(frozen=True)
class PipelineSource:
    """A repository in diffusers layout. `given` components come from elsewhere, of `bare` ones only the configuration
    is needed."""

    repo: str
    revision: str
    into: Path
    variant: str | None = None
    given: frozenset[str] = frozenset()
    bare: frozenset[str] = frozenset()

    def pick(self, names: Iterable[str], read: Callable[[str], str], /) -> dict[str, Path]:
        """The files of the components that the index names, and the index last: without it nothing looks installed."""
        names = list(names)
        if INDEX not in names:
            raise ValueError(f"the hub's {self.repo} holds no {INDEX}: it is not in diffusers layout")
        parts = [name for name in named_parts(json.loads(read(INDEX))) if name not in self.given]
        files = [file for part in parts for file in self._files(part, names)]
        return {file: self.into / file for file in [*files, INDEX]}

    def _files(self, part: str, names: Iterable[str]) -> list[str]:
        return _needed(names, part, self.variant, has_weights(part) and part not in self.bare)


@dataclass(frozen=True)
class PartSource:
    """A repository with one component: in the folder `inside`, or in one with the component's name, or at its root."""

    repo: str
    revision: str
    into: Path
    component: str
    inside: str = ""
    variant: str | None = None

    def pick(self, names: Iterable[str], _read: Callable[[str], str], /) -> dict[str, Path]:
        """The files of the component."""
        names = list(names)
        own = any(name.startswith(f"{self.component}/") for name in names)
        folder = self.inside or (self.component if own else "")
        files = _needed(names, folder, self.variant, has_weights(self.component))
        if not files:
            raise ValueError(f"the hub's {self.repo} holds no files of {self.component}")
        return {file: self.into / PurePosixPath(file).name for file in files}


@dataclass(frozen=True)
class FileSource:
    """One file of a repository."""

    repo: str
    revision: str
    into: Path
    file: str

    def pick(self, names: Iterable[str], _read: Callable[[str], str], /) -> dict[str, Path]:
        """That file."""
        if self.file not in names:
            raise ValueError(f"the hub's {self.repo} holds no file {self.file}")
        return {self.file: self.into / self.file}


def _needed(names: Iterable[str], folder: str, variant: str | None, weighty: bool) -> list[str]:
    """The files of a component in a repository: what is small, and one set of safetensors.

    A component that has no weights of the variant is taken without it, as diffusers does.
    """
    here = [path for path in map(PurePosixPath, names) if str(path.parent) == (folder or ".")]
    small = [path for path in here if path.suffix in _SMALL and ".index." not in path.name and path.name != INDEX]
    chosen = [path for path in here if variant and re.fullmatch(_of_variant(re.escape(variant)), path.name)]
    plain = [path for path in here if re.fullmatch(_PLAIN, path.name)]
    return [str(path) for path in [*small, *((chosen or plain) if weighty else [])]]


_PLAIN = rf"{_TENSORS}({_SHARD}\.safetensors|\.safetensors\.index\.json)"


def _of_variant(word: str) -> str:
    """The names that weights of a variant have, the older way of writing shards too."""
    weights = rf"(\.{word}{_SHARD}|{_SHARD}\.{word})\.safetensors"
    return rf"{_TENSORS}({weights}|\.safetensors\.(index\.{word}|{word}\.index)\.json)"


def missing(model: Model, models_dir: Path) -> list[Source]:
    """What has to come from the hub before `locate` finds this model."""
    sources: list[Source] = []
    own = models_dir / model.id
    if _folder(model, models_dir) is None:
        into = models_dir / (model.base or model.id)
        given, bare = frozenset(model.extra_repos), _bare(model)
        sources.append(PipelineSource(model.repo, model.revision or "main", into, model.variant, given, bare))
    for name, place in model.extra_repos.items():
        repo, _, inside = place.partition("#")
        if _part(model, name, models_dir) is None:
            sources.append(PartSource(repo, "main", own / name, name, inside, model.variant))
    absent = [lora for lora in model.recipe_loras if _lora(lora, own / "loras") is None]
    return [*sources, *(FileSource(lora["repo"], "main", own / "loras", lora["file"]) for lora in absent)]


def _bare(model: Model) -> frozenset[str]:
    """The components whose weights a single file brings."""
    if isinstance(model.single_file, str):
        return DENOISER if model.single_file else frozenset()
    return frozenset(model.single_file)


def _folder(model: Model, models_dir: Path) -> Path | None:
    given, bare = frozenset(model.extra_repos), _bare(model)
    return next((folder for folder in _folders(model, models_dir) if is_whole(folder, given, bare)), None)


def _folders(model: Model, models_dir: Path) -> Iterator[Path]:
    if model.builtin:
        yield PACKAGE / model.builtin
        return
    yield models_dir / model.id
    if model.base:
        yield models_dir / model.base
    yield _snapshot(model.repo, model.revision or "main")


def _part(model: Model, name: str, models_dir: Path) -> Path | None:
    """The folder of a component that has a repository of its own."""
    repo, _, inside = model.extra_repos[name].partition("#")
    snapshot = _snapshot(repo, "main")
    places = (models_dir / model.id / name, snapshot / (inside or name), snapshot / inside)
    return next((place for place in places if place.is_dir() and _part_is_whole(place, name)), None)


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
