"""Tiny checkpoints for every model of the catalogue, made from nothing in a moment. See README.md.

Each module of this package offers some of: MODELS (model id → a function that makes its pipeline), LORAS (model id → a
function that writes the recipe's files into a folder), PROOFS (model id, or "id-task" → how it is asked).
"""

import importlib
import json
import pkgutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from engine.catalog.models import Model
from tests.proof import Proof

_MODULES = [importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]


def _gathered(name: str) -> dict[str, Any]:
    return {key: value for module in _MODULES for key, value in getattr(module, name, {}).items()}


MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = _gathered("MODELS")
LORAS: Mapping[str, Callable[[Path], None]] = _gathered("LORAS")
PROOFS: Mapping[str, Proof] = _gathered("PROOFS")


def proof(model_id: str, task: str) -> Proof:
    """How this task of the model is asked."""
    return PROOFS.get(f"{model_id}-{task}") or PROOFS.get(model_id) or Proof()


def build(model: Model, models_dir: Path) -> None:
    """Write the weights of `model` as a download would have, the same bytes at each call, unlike any other model's.

    A recipe has LoRA files of its own, and the weights of its base.
    """
    owner = model.base or model.id
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # of libraries that are built on deprecated parts
            warnings.simplefilter("ignore", kind)
        if not (models_dir / owner).exists():
            torch.manual_seed(zlib.crc32(owner.encode()))
            MODELS[owner]().save_pretrained(models_dir / owner, variant=model.variant)
            _use_published_names(models_dir / owner / "model_index.json")
        if model.recipe_loras:
            torch.manual_seed(zlib.crc32(model.id.encode()))
            LORAS[model.id](models_dir / model.id / "loras")


PUBLISHED_NAMES = {
    "tokenizer": {"T5Tokenizer": "T5TokenizerFast"},
    "image_processor": {"CLIPImageProcessorPil": "CLIPImageProcessor"},
}


def _use_published_names(index: Path) -> None:
    """Name the classes as the hub's checkpoints do, which were saved by older versions, or with torchvision."""
    parts = json.loads(index.read_text())
    for part, names in PUBLISHED_NAMES.items():
        if part in parts and parts[part][1] in names:
            parts[part][1] = names[parts[part][1]]
    index.write_text(json.dumps(parts, indent=2))
