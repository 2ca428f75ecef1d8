"""Load a diffusers pipeline from its files, in the dtypes that the catalogue names."""

import inspect
import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers

from engine.catalog.models import Model, Pipeline
from engine.catalog.weights import INDEX, Weights, named_parts
from engine.gpu.load import kernels, offloading, single_file
from engine.gpu.run import prompts
from engine.gpu.run.adapters import load_file
from engine.job import EngineError

# The meter reports progress, and a fault is an exception: bars and hints would only fill the log.
for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
NOTHING: Mapping[str, Any] = MappingProxyType({})


def load(
    model: Model,
    pipeline: Pipeline,
    weights: Weights,
    device: torch.device,
    ready: Mapping[str, Any] = NOTHING,
    *,
    without: Collection[str] = (),
) -> Any:
    """The model's pipeline in RAM, in the catalogue's dtypes for a GPU and in float32 for a CPU.

    `ready` are denoisers that are there already, with the recipe in them; their weights are not read. Nor are those of
    the components `without` which the pipeline is to be.
    Only safetensors are read: a pickled checkpoint could run code.
    """
    cls, index = class_of(pipeline), json.loads((weights.folder / INDEX).read_text())
    given = {**ready, **dict.fromkeys(without)}
    if weights.files:
        given = {**single_file.components(cls, weights, partial(dtype_of, model, device), given), **given}
    for name, folder in weights.parts.items():
        if name not in given:
            given[name] = _part(folder, index.get(name), name, dtype_of(model, device, name))
    pipe = cls.from_pretrained(
        weights.folder, dtype=_dtypes(model, device), variant=model.variant, use_safetensors=True,
        local_files_only=True, **given,
    )  # fmt: skip
    _set_up(pipe, model, pipeline)
    if not ready:
        _fuse_recipe(pipe, model, weights)
    return pipe


def _set_up(pipe: Any, model: Model, pipeline: Pipeline) -> None:
    """What the catalogue says that a fresh pipeline needs."""
    pipe.set_progress_bar_config(disable=True)
    if pipeline.tiled_vae and pipe.vae:
        pipe.vae.enable_tiling()
    if model.attention_backend:
        kernels.set_backend(pipe.transformer, model.attention_backend)
    if model.schedule:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **model.schedule)


def others(weights: Weights) -> list[str]:
    """The components that are neither denoisers nor the scheduler."""
    named = named_parts(json.loads((weights.folder / INDEX).read_text()))
    return [name for name in named if name != "scheduler" and not offloading.is_denoiser(name)]


def _fuse_recipe(pipe: Any, model: Model, weights: Weights) -> None:
    """Add the LoRAs that make this model out of its base to the weights themselves: they cost nothing at run time."""
    recipe = list(zip(model.recipe_loras, weights.loras, strict=True))
    if not recipe:
        return
    for lora, path in recipe:
        load_file(pipe, path, lora["adapter"], lora["target"])
    pipe.set_adapters([lora["adapter"] for lora, _ in recipe], [lora["weight"] for lora, _ in recipe])
    pipe.fuse_lora(components=sorted({lora["target"] for lora, _ in recipe}))
    pipe.unload_lora_weights()


def _part(folder: Path, indexed: Any, name: str, dtype: torch.dtype) -> Any:
    """The component in a folder outside the pipeline's; `indexed` is its entry in the pipeline's index."""
    if name.startswith("tokenizer"):  # it may be beside its model, whose configuration says nothing of it
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not (folder / "config.json").is_file():
        return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    cls = component_class(folder, indexed)
    return cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)


def component_class(folder: Path, indexed: Any = None) -> Any:
    """The class that the component's configuration names, or its pipeline's index; None if neither library has it."""
    config = json.loads((folder / "config.json").read_text())
    named = (config.get("_class_name"), *(indexed or ())[1:], *(config.get("architectures") or ()))
    name = next(filter(None, named), "")
    return getattr(diffusers, name, None) or getattr(transformers, name, None)


def dtype_of(model: Model, device: torch.device, name: str) -> torch.dtype:
    dtypes = _dtypes(model, device)
    return dtypes.get(name, dtypes["default"]) if isinstance(dtypes, dict) else dtypes


def class_of(pipeline: Pipeline) -> Any:
    try:
        return getattr(diffusers, pipeline.cls)
    except AttributeError:
        raise EngineError(f"This diffusers ({diffusers.__version__}) has no {pipeline.cls}.", "no_such_class") from None


def _dtypes(model: Model, device: torch.device) -> torch.dtype | dict[str, torch.dtype]:
    if device.type == "cpu":
        return torch.float32
    by_component = {name: getattr(torch, dtype) for name, dtype in model.dtypes.items()}
    return {"default": by_component.get("transformer", torch.bfloat16), **by_component}


def sibling(pipe: Any, pipeline: Pipeline) -> Any:
    """The components of `pipe` behind another class. (`from_pipe` would cast them all to one dtype.)"""
    cls = class_of(pipeline)
    if type(pipe) is cls:
        return pipe
    known = {**pipe.config, **pipe.components}
    other = cls(**{name: known[name] for name in inspect.signature(cls).parameters if name in known})
    other.set_progress_bar_config(disable=True)
    prompts.inherit(pipe, other)
    return other
