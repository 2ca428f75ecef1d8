"""Load a diffusers pipeline from its files, in the dtypes that the catalogue names."""

import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
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


def load(
    model: Model,
    pipeline: Pipeline,
    weights: Weights,
    device: torch.device,
    ready: Mapping[str, Any] | None = None,
    *,
    denoisers_only: bool = False,
) -> Any:
    """The model's pipeline in RAM, in the catalogue's dtypes for a GPU and in float32 for a CPU.

    `ready` are denoisers that are there already, with the recipe in them. With `denoisers_only` the pipeline has
    nothing but them and a scheduler. Only safetensors are read: a pickled checkpoint could run code.
    """
    cls, index = _class_of(pipeline), json.loads((weights.folder / INDEX).read_text())
    named = named_parts(index) if denoisers_only else ()
    without = [name for name in named if name != "scheduler" and not offloading.is_denoiser(name)]
    given = {**(ready or {}), **dict.fromkeys(without)}
    dtype = partial(dtype_of, model, device)
    if weights.files:
        given = {**single_file.components(cls, index, weights, dtype, given), **given}
    for name, folder in weights.parts.items():
        if name not in given:
            given[name] = component(name, folder, dtype(name), index.get(name))
    pipe = cls.from_pretrained(
        weights.folder, dtype={name: dtype(name) for name in index}, variant=model.variant, use_safetensors=True,
        local_files_only=True, **given,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    if pipeline.tiled_vae and pipe.vae:
        pipe.vae.enable_tiling()
    if model.attention_backend:
        kernels.set_backend(pipe.transformer, model.attention_backend)
    if model.schedule:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **model.schedule)
    if model.recipe_loras and not ready:
        _fuse_recipe(pipe, model, weights)
    return pipe


def _fuse_recipe(pipe: Any, model: Model, weights: Weights) -> None:
    """Add the LoRAs that make this model out of its base to the weights themselves: they cost nothing at run time."""
    recipe = model.recipe_loras
    for lora, path in zip(recipe, weights.loras, strict=True):
        load_file(pipe, path, lora["adapter"], lora["target"])
    pipe.set_adapters([lora["adapter"] for lora in recipe], [lora["weight"] for lora in recipe])
    pipe.fuse_lora(components=sorted({lora["target"] for lora in recipe}))
    pipe.unload_lora_weights()


def component(name: str, folder: Path, dtype: torch.dtype, indexed: Any = None) -> Any:
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
    """The dtype in which the component `name` is computed."""
    if device.type == "cpu":
        return torch.float32
    dtype: torch.dtype = getattr(torch, model.dtypes.get(name) or model.dtypes.get("transformer", "bfloat16"))
    return dtype


def _class_of(pipeline: Pipeline) -> Any:
    try:
        return getattr(diffusers, pipeline.cls)
    except AttributeError:
        raise EngineError(f"This diffusers ({diffusers.__version__}) has no {pipeline.cls}.", "no_such_class") from None


def sibling(pipe: Any, pipeline: Pipeline) -> Any:
    """The components of `pipe` behind another class. (`from_pipe` would cast them all to one dtype.)"""
    cls = _class_of(pipeline)
    if type(pipe) is cls:
        return pipe
    known = {**pipe.config, **pipe.components}
    other = cls(**{name: known[name] for name in inspect.signature(cls).parameters if name in known})
    other.set_progress_bar_config(disable=True)
    prompts.inherit(pipe, other)
    return other
