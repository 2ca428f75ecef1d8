"""LoRA files on the daemon's side: where they are, whether their headers fit a model, strengths over the steps."""

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.catalog.models import Model
from engine.catalog.weights import DENOISER
from engine.job import Lora

SUFFIX = ".safetensors"
_DOWN = re.compile(r"^(?P<layer>.+?)[._](?:lora_A|lora_down)(?:\.default)?\.weight$")
_BLOCK = re.compile(r"(?:^|[._])(\w*?blocks)[._](\d+)[._]")
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
    entries = re.sub(r"^\s*#.*", "", text, flags=re.MULTILINE).split()
    if len(entries) > count:
        raise BadLora(f"loras_multipliers: {len(entries)} entries for {count} LoRAs; give one each, parted by spaces")
    found: list[tuple[tuple[float, ...], ...]] = [((1.0,),)] * count
    for place, entry in enumerate(entries):
        try:
            found[place] = tuple(tuple(map(float, phase.split(","))) for phase in entry.split(";"))
        except ValueError:
            raise BadLora(f"loras_multipliers: '{entry}' must be numbers such as 0.8, 0,0.5,1 or 1;0") from None
    return found


def _misfit(path: Path, weights: Path) -> str:
    """Why a layer of the LoRA has no counterpart in the model; "" if each has one. Raises BadLora."""
    shapes, blocks = _model_layers(weights)
    for layer, shape in _lora_layers(path).items():
        found = _BLOCK.search(layer)
        if found and int(found[2]) > blocks.get(found[1], math.inf):
            return f"it has {found[1]} {found[2]}, and the model's last is {blocks[found[1]]}"
        if shape not in shapes:
            return f"its layer {layer} is {shape[0]}x{shape[1]}, and the model has none of that size"
    return ""


def _lora_layers(path: Path) -> dict[str, tuple[int, int]]:
    """Name and shape (out, in) of each layer of the denoiser that the LoRA changes. Raises BadLora."""
    header, layers = _header(path), {}
    for key, entry in header.items():
        if (down := _DOWN.match(key)) and not _TEXT.search(key):
            up = key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
            if up not in header:
                raise BadLora(f"activated_loras: '{path.name}' is broken: {key} has no counterpart")
            layers[down["layer"]] = header[up]["shape"][0], math.prod(entry["shape"][1:])
    if not layers:
        raise BadLora(f"activated_loras: '{path.name}' holds no LoRA layers")
    return layers


@lru_cache(maxsize=8)
def _model_layers(weights: Path) -> tuple[frozenset[tuple[int, int]], Mapping[str, int]]:
    """The shapes (out, in) of a model's denoiser, and the number of the last block of each kind."""
    shapes: set[tuple[int, int]] = set()
    blocks: dict[str, int] = {}
    files = [path for name in DENOISER for path in (weights / name).glob(f"*{SUFFIX}")]
    for key, entry in (tensor for path in files for tensor in _header(path).items()):
        if len(shape := entry["shape"]) > 1:
            shapes.add((shape[0], math.prod(shape[1:])))
        if found := _BLOCK.search(key):
            blocks[found[1]] = max(blocks.get(found[1], 0), int(found[2]))
    return frozenset(shapes), blocks


def _header(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file: name → {"dtype", "shape", …}. Raises BadLora."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > 100_000_000:  # the format's own limit
                raise ValueError(size)
            header: dict[str, Any] = json.loads(file.read(size))
    except (OSError, ValueError):
        raise BadLora(f"activated_loras: '{path.name}' is no safetensors file; download it again") from None
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}
