"""LoRA files on the daemon's side: where they are, whether their headers fit a model, strengths over the steps."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path

from engine.catalog.models import Model
from engine.catalog.weights import DENOISER, read_tensors
from engine.job import Lora

SUFFIX = ".safetensors"
_DOWN = re.compile(r"^(?P<layer>.+?)[._](?:lora_A|lora_down)(?:\.default)?\.weight$")
_BLOCK = re.compile(r"(blocks)[._]([0-9]{1,9})[0-9]*[._]")
_TEXT = re.compile(r"(?:^|[._])(?:text_encoder|te\d?)(?:_\d)?[._]")


class BadLora(Exception):
    """A LoRA can't be used: one sentence, which begins with the request's field."""


def available(model: Model, loras_dir: Path) -> list[str]:
    """The names of the files for this model, which `activated_loras` takes."""
    return sorted(path.name for path in (loras_dir / model.family).glob(f"*{SUFFIX}") if path.is_file())


def chosen(names: list[str], multipliers: str, model: Model, loras_dir: Path, weights: Path) -> tuple[Lora, ...]:
    """The LoRAs of a request, each checked against the model whose files are in `weights`. Raises BadLora."""
    there = available(model, loras_dir)
    loras = []
    for name, phases in zip(names, _phases(multipliers, len(names)), strict=True):
        file = name.removesuffix(SUFFIX) + SUFFIX
        if file not in there:
            known = f"there are: {', '.join(there)}" if there else "there is none"
            raise BadLora(f"activated_loras: '{name}' is not in the LoRA folder of family '{model.family}'; {known}")
        path = loras_dir / model.family / file
        if misfit := _misfit(path, weights):
            raise BadLora(f"activated_loras: '{file}' does not fit model '{model.id}': {misfit}")
        loras.append(Lora(path, phases))
    return tuple(loras)


def _phases(text: str, count: int) -> list[tuple[tuple[float, ...], ...]]:
    """The strengths of each LoRA, by phase of guidance and spread over the steps; 1 where none is given."""
    entries = re.sub(r"^[^\S\n]*#.*", "", text, flags=re.MULTILINE).split()
    if len(entries) > count:
        raise BadLora(f"loras_multipliers: {len(entries)} entries for {count} LoRAs; give one each, parted by spaces")
    found: list[tuple[tuple[float, ...], ...]] = [((1.0,),)] * count
    for place, entry in enumerate(entries):
        phases: tuple[tuple[float, ...], ...] = ((math.nan,),)
        with suppress(ValueError):
            phases = tuple(tuple(map(float, phase.split(","))) for phase in entry.split(";"))
        if not all(map(math.isfinite, chain(*phases))):
            raise BadLora(f"loras_multipliers: '{entry}' must be numbers such as 0.8, 0,0.5,1 or 1;0")
        found[place] = phases
    return found


def _misfit(path: Path, weights: Path) -> str:
    """Why a layer of the LoRA has no counterpart in the model; "" if each has one. Raises BadLora."""
    shapes, blocks = _model_layers(weights)
    for layer, shape in _lora_layers(path).items():
        found = _block(layer)
        if found and found[1] > blocks.get(found[0], math.inf):
            return f"it has {found[0]} {found[1]}, and the model's last is {blocks[found[0]]}"
        if shape not in shapes:
            return f"its layer {layer} is {shape[0]}x{shape[1]}, and the model has none of that size"
    return ""


def _lora_layers(path: Path) -> dict[str, tuple[int, int]]:
    """Name and shape (out, in) of each layer of the denoiser that the LoRA changes. Raises BadLora."""
    shapes, layers = _shapes(path), {}
    for key, shape in shapes.items():
        if (down := _DOWN.match(key)) and not _TEXT.search(key):
            up = key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
            if not shapes.get(up):
                raise BadLora(f"activated_loras: '{path.name}' is broken: {key} has no counterpart")
            layers[down["layer"]] = shapes[up][0], math.prod(shape[1:])
    if not layers:
        raise BadLora(f"activated_loras: '{path.name}' holds no LoRA layers")
    return layers


@lru_cache(maxsize=8)
def _model_layers(weights: Path) -> tuple[frozenset[tuple[int, int]], Mapping[str, int]]:
    """The shapes (out, in) of a model's denoiser, and the number of the last block of each kind."""
    shapes: set[tuple[int, int]] = set()
    blocks: dict[str, int] = {}
    files = [path for name in DENOISER for path in (weights / name).glob(f"*{SUFFIX}")]
    for key, shape in (tensor for path in files for tensor in _shapes(path).items()):
        if len(shape) > 1:
            shapes.add((shape[0], math.prod(shape[1:])))
        if found := _block(key):
            blocks[found[0]] = max(blocks.get(found[0], 0), found[1])
    return frozenset(shapes), blocks


def _block(key: str) -> tuple[str, int] | None:
    """Which list of blocks a tensor belongs to, and the number of its block there."""
    found = _BLOCK.search(key)
    return (key[: found.end(1)].rpartition(".")[2], int(found[2])) if found else None


def _shapes(path: Path) -> dict[str, Sequence[int]]:
    """The tensors of a safetensors file: name → shape. Raises BadLora."""
    try:
        return read_tensors(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)  # without the path
        raise BadLora(f"activated_loras: '{path.name}' is no safetensors file ({reason}); download it again") from None
