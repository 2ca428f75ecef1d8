"""A diffusers pipeline: loaded from its files, in the dtypes that the catalogue names, and set for a task and a job."""

import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import safe_open

from engine.catalog.models import Model, Pipeline
from engine.catalog.weights import DENOISER, INDEX, Weights, named_parts
from engine.gpu.load import kernels, offloading
from engine.gpu.run import prompts
from engine.gpu.run.adapters import load_file
from engine.job import EngineError, Job

# How the original layouts name what is not the denoiser: a file that has any of it is a whole checkpoint.
NOT_OF_A_DENOISER = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")
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
    dtype, whole = partial(dtype_of, model, device), is_whole(weights)
    named = named_parts(index) if denoisers_only else ()
    without = [name for name in named if name != "scheduler" and not offloading.is_denoiser(name)]
    given = {**(_of_checkpoint(cls, weights, dtype) if whole else {}), **(ready or {}), **dict.fromkeys(without)}
    denoiser = next(iter(sorted(DENOISER & index.keys())), "transformer")
    files = {} if whole else {name or denoiser: file for name, file in weights.files.items()}
    for name, place in {**weights.parts, **files}.items():
        if name not in given:
            made = partial(_of_file, weights.folder) if name in files else component
            given[name] = made(name, place, dtype(name), index.get(name))
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
        reschedule(pipe, **model.schedule)
    if model.recipe_loras and not ready:
        _fuse_recipe(pipe, model, weights)
    return pipe


def is_whole(weights: Weights) -> bool:
    """Whether there is a single file that holds more than a denoiser. A GGUF file never does."""
    file = weights.files.get("")
    if file is None or file.suffix == ".gguf":
        return False
    with safe_open(file, framework="pt") as tensors:
        return any(name.startswith(NOT_OF_A_DENOISER) for name in tensors.keys())  # noqa: SIM118  # no mapping


def _of_checkpoint(cls: Any, weights: Weights, dtype: Callable[[str], torch.dtype]) -> dict[str, Any]:
    """Every component of a whole checkpoint: what the file lacks comes from the folder."""
    pipe = _from_single_file(cls, cls.__name__, weights.files[""], weights.folder)
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    return {name: part.to(dtype(name)) if isinstance(part, torch.nn.Module) else part for name, part in parts.items()}


def _of_file(folder: Path, name: str, file: Path, dtype: torch.dtype, indexed: Any) -> Any:
    """The component in a single file, with its configuration from the pipeline's folder. GGUF stays quantised."""
    options: dict[str, Any] = {"subfolder": name, "dtype": dtype}
    if file.suffix == ".gguf":
        options["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    cls = getattr(diffusers, indexed[1], None) if indexed else None
    return _from_single_file(cls, name, file, folder, **options)


def _from_single_file(cls: Any, what: str, file: Path, folder: Path, **options: Any) -> Any:
    if not hasattr(cls, "from_single_file"):
        raise EngineError(f"single_file: diffusers can't load {what} from {file.name}.", "no_single_file")
    return cls.from_single_file(str(file), config=str(folder), local_files_only=True, **options)


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
    on_card = model.dtypes.get(name, model.dtypes.get("transformer", "bfloat16"))
    dtype: torch.dtype = getattr(torch, "float32" if device.type == "cpu" else on_card)
    return dtype


def _class_of(pipeline: Pipeline) -> Any:
    if (cls := getattr(diffusers, pipeline.cls, None)) is None:
        raise EngineError(f"This diffusers ({diffusers.__version__}) has no {pipeline.cls}.", "no_such_class")
    return cls


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


def reschedule(pipe: Any, **changes: Any) -> None:
    """Give `pipe` a scheduler of the same class with some settings changed."""
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)


def adjust(pipe: Any, model: Model, job: Job) -> None:
    """Set the shift, the guidance scale and the side of the picture for `job`, where the class takes them so."""
    pipeline, shift = model.pipelines[job.task], model.scheduler.get("shift_param")
    if shift and job.flow_shift is not None and pipe.scheduler.config[shift] != job.flow_shift:
        reschedule(pipe, **{shift: job.flow_shift})  # else it stays: it starts over when its timesteps are set
    if pipeline.guider and job.guidance_scale is not None:
        for name in ("guider", "ocr_guider"):  # some classes have a second one, for prompts that ask for written text
            if (guider := getattr(pipe, name, None)) is not None:
                setattr(pipe, name, guider.new(guidance_scale=job.guidance_scale))
    if pipeline.side_attribute:
        side = (job.width * job.height) ** 0.5 / pipe.vae_scale_factor  # in latent pixels, of a square of this area
        setattr(pipe, pipeline.side_attribute, side * (1 + 1e-9))  # a touch longer, as sizes are rounded down
