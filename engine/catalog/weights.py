"""Where a model's weights are: in the package, in `models_dir` or in the Hugging Face cache; and what is missing."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from engine.catalog.models import PACKAGE, Model
from engine.files.folders import open_regular

MAX_HEADER_BYTES = 4 * 2**20  # of a safetensors file: most have less than 1, and parsing one stops the event loop
MAX_DIMENSIONS = 8
INDEX = "model_index.json"  # the file that makes a folder a diffusers pipeline
DENOISER = frozenset({"transformer", "unet"})  # the component that a single file without a name replaces
# Components that only prepare or schedule. Their folder may hold weights that are not theirs.
_WITHOUT_WEIGHTS = ("tokenizer", "feature_extractor", "image_processor", "processor", "scheduler")
# What accompanies the weights. Never pickles or a repository's Python: both could run code.
_SMALL = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".yaml"})
# Weights, and the index of their shards, as diffusers and transformers name them, apart from the variant.
_TENSORS = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Weights:
    """A diffusers folder, and what complements or replaces parts of it."""

    folder: Path
    loras: tuple[Path, ...] = ()  # of the model's recipe, in its order
    parts: Mapping[str, Path] = field(default_factory=dict)  # component from another repository → its folder
    files: Mapping[str, Path] = field(default_factory=dict)  # component → its single file; "": the denoiser or all


def locate(model: Model, models_dir: Path) -> Weights | None:
    """Where this model's weights are, or None unless all are installed."""
    folder, files = _folder(model, models_dir), {name: models_dir / file for name, file in model.files.items()}
    parts = {name: _part(model, name, models_dir) for name in model.extra_repos}
    loras = [_lora(lora, models_dir / model.id / "loras") for lora in model.recipe_loras]
    if folder is None or None in parts.values() or None in loras or not all(map(Path.is_file, files.values())):
        return None
    return Weights(folder, tuple(filter(None, loras)), {name: path for name, path in parts.items() if path}, files)


def remedy(model: Model, models_dir: Path) -> str:
    """How to get this model's weights to where `locate` finds them, as the end of a sentence."""
    absent = next((file for file in model.files.values() if not (models_dir / file).is_file()), None)
    if absent:  # it is on no hub: the user has it
        return f"its entry names the file {absent}, which is not in models_dir; put it there"
    return f"install it with: wangpd models download {model.id}"


def read_object(text: str | bytes) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for anything else, also for one that is nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("the JSON is no object")
    return value


def _content(index: Path) -> bytes:
    with open_regular(index, flags=0) as file:
        return file.read(MAX_HEADER_BYTES)


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the tensors in the header of a safetensors file: name → shape. Raises OSError, ValueError."""
    with open_regular(path, flags=0) as file:
        size_bytes = int.from_bytes(file.read(8), "little")
        if size_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {size_bytes} bytes, more than {MAX_HEADER_BYTES}")
        raw = file.read(size_bytes)
    if len(raw) < size_bytes:
        raise ValueError("it is cut off")
    header = read_object(raw)
    header.pop("__metadata__", None)
    shapes: dict[str, Any] = {}
    for name, tensor in header.items():
        shape: Any = tensor.get("shape") if isinstance(tensor, dict) else None
        listed = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
        if not listed or not all(type(length) is int and 0 <= length < 2**63 for length in shape):
            raise ValueError(f"its tensor {name[:100]} has no shape")
        shapes[name] = shape
    return shapes


def named_parts(index: Mapping[str, Any]) -> list[str]:
    """The components in a pipeline's index, without those it leaves empty; a list of numbers is a setting."""
    return [name for name, about in index.items() if isinstance(about, list) and about and isinstance(about[0], str)]


def has_weights(component: str) -> bool:
    """False for a component that only prepares or schedules."""
    return not component.startswith(_WITHOUT_WEIGHTS)


def component_files(names: Iterable[str], variant: str | None, folder: str = "", heavy: bool = True) -> list[str]:
    """Of the files `names`, those in `folder` that a component needs: what is small, and one set of weights (`heavy`).

    Where there are none of the variant, those without one, as diffusers loads them.
    """
    here = [path for path in map(PurePosixPath, names) if str(path.parent) == (folder or ".")]
    wanted = [path for path in here if path.suffix in _SMALL and ".index." not in path.name and path.name != INDEX]
    if heavy:
        word = f".{variant}"
        of_variant = [path for path in here if word in path.name and _TENSORS.fullmatch(path.name.replace(word, "", 1))]
        wanted += of_variant or [path for path in here if _TENSORS.fullmatch(path.name)]
    return list(map(str, wanted))


@dataclass(frozen=True)
class Source:
    """A repository on the hub that has missing files.

    `pick(names, read)` returns where each of its files that are needed belongs; `read` returns the text of a file.
    Raises ValueError if the repository has another layout than expected.
    """

    repo: str
    revision: str
    pick: Callable[[Sequence[str], Callable[[str], str]], dict[str, Path]]


def missing(model: Model, models_dir: Path) -> list[Source]:
    """What must come from the hub before `locate` finds this model."""
    own = models_dir / model.id
    sources: list[Source] = []
    if _folder(model, models_dir) is None:
        pick = partial(_pick_pipeline, model, models_dir / (model.base or model.id))
        sources.append(Source(model.repo, model.revision or "main", pick))
    for name in (name for name in model.extra_repos if _part(model, name, models_dir) is None):
        repo = model.extra_repos[name].partition("#")[0]
        sources.append(Source(repo, "main", partial(_pick_component, model, name, own / name)))
    for lora in (lora for lora in model.recipe_loras if _lora(lora, own / "loras") is None):
        sources.append(Source(lora["repo"], "main", partial(_pick_lora, lora, own / "loras")))
    return sources


def _pick_pipeline(model: Model, into: Path, names: Sequence[str], read: Callable[[str], str], /) -> dict[str, Path]:
    """The files of the components in the index, and the index last: without it nothing looks installed."""
    if INDEX not in names:
        raise ValueError(f"the hub's {model.repo} holds no {INDEX}: it is not in diffusers layout")
    heavy = {name: has_weights(name) and name not in _bare(model) for name in _own_parts(model, read(INDEX))}
    files = [file for name in heavy for file in component_files(names, model.variant, name, heavy[name])]
    return {file: into / file for file in [*files, INDEX]}


def _pick_component(model: Model, component: str, into: Path, names: Sequence[str], _read: Any, /) -> dict[str, Path]:
    """The files in the folder that the entry names, or else in one of the component's name, or else at the root."""
    repo, _, inside = model.extra_repos[component].partition("#")
    folder = inside or (component if any(name.startswith(f"{component}/") for name in names) else "")
    files = component_files(names, model.variant, folder, has_weights(component))
    if not files:
        raise ValueError(f"the hub's {repo} holds no files of {component}")
    return {file: into / PurePosixPath(file).name for file in files}


def _pick_lora(lora: Mapping[str, Any], into: Path, names: Sequence[str], _read: Any, /) -> dict[str, Path]:
    if lora["file"] not in names:
        raise ValueError(f"the hub's {lora['repo']} holds no file {lora['file']}")
    return {lora["file"]: into / lora["file"]}


def _folder(model: Model, models_dir: Path) -> Path | None:
    installed = [models_dir / name for name in (model.id, model.base) if name]
    snapshot = _snapshot(model.repo, model.revision or "main")
    places = [PACKAGE / model.builtin] if model.builtin else [*installed, snapshot]
    return next((place for place in places if _is_whole(place, model)), None)


def _is_whole(folder: Path, model: Model) -> bool:
    try:
        names = set(_own_parts(model, _content(folder / INDEX)))
        if not (folder / "scheduler").exists():  # a class with a schedule of its own names a scheduler and saves none
            names.discard("scheduler")
        bare = names & _bare(model)
        configured = all((folder / name / "config.json").is_file() for name in bare)
        return configured and all(_part_is_whole(folder / name, name) for name in names - bare)
    except (OSError, ValueError):  # ValueError: a file that was cut off
        return False


def _own_parts(model: Model, index: str | bytes) -> list[str]:
    return [name for name in named_parts(read_object(index)) if name not in model.extra_repos]


def _bare(model: Model) -> frozenset[str]:
    """The components that need only their configuration: a single file brings their weights."""
    return DENOISER if "" in model.files else frozenset(model.files)


def _part_is_whole(part: Path, name: str) -> bool:
    if not has_weights(name):
        return any(path.is_file() for path in part.glob("*"))
    indexes = part.glob("*.safetensors.index*.json")
    try:
        shards = {shard for index in indexes for shard in read_object(_content(index))["weight_map"].values()}
        if shards:
            return all((part / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # it is cut off, or something else
        return False
    usual = "*.safetensors" if (part / "config.json").is_file() else "*"  # one file, or none at all, as of a guider
    return any(path.is_file() for path in part.glob(usual))


def _part(model: Model, name: str, models_dir: Path) -> Path | None:
    repo, _, inside = model.extra_repos[name].partition("#")
    snapshot = _snapshot(repo, "main")
    places = (models_dir / model.id / name, snapshot / (inside or name), snapshot / inside)
    return next((place for place in places if place.is_dir() and _part_is_whole(place, name)), None)


def _lora(lora: Mapping[str, Any], folder: Path) -> Path | None:
    name = Path(lora["file"])
    places = (folder / name, folder / name.name, _snapshot(lora["repo"], "main") / name)
    return next((place for place in places if place.is_file()), None)


def _snapshot(repo: str, revision: str) -> Path:
    """A repository's folder in the Hugging Face cache. (Found without the hub's client, too heavy for the daemon.)"""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    cached = cache / ("models--" + repo.replace("/", "--"))
    with suppress(OSError):  # a revision that is a commit has no ref: its snapshot has its name
        revision = (cached / "refs" / revision).read_text().strip()
    return cached / "snapshots" / revision
