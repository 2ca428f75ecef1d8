"""Checkpoints in a single file, as people share them: a denoiser (safetensors or GGUF), or a whole pipeline."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open

from engine.catalog.weights import DENOISER, Weights
from engine.job import EngineError

# How the original layouts name what is not the denoiser: a file that has any of it is a whole checkpoint.
NOT_OF_A_DENOISER = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")


def components(
    cls: Any,
    index: Mapping[str, Any],
    weights: Weights,
    dtype_of: Callable[[str], torch.dtype],
    besides: Collection[str],
) -> dict[str, Any]:
    """The components whose weights come from single files, each in its dtype.

    `cls` and `index` are the pipeline's; the configurations are in the weights' folder. GGUF weights stay quantised.
    Files of the components `besides` these are not read, but that of a whole checkpoint is. Raises EngineError.
    """
    if is_whole(weights.files.get("")):
        return _of_pipeline(cls, weights, dtype_of)
    denoiser = next(iter(sorted(DENOISER & index.keys())), "transformer")
    files = {name or denoiser: path for name, path in weights.files.items()}
    return {
        name: _component(name, path, weights.folder, index, dtype_of(name))
        for name, path in files.items()
        if name not in besides
    }


def is_whole(file: Path | None) -> bool:
    """Whether the file holds more than a denoiser. A GGUF file never does."""
    if file is None or file.suffix == ".gguf":
        return False
    with safe_open(file, framework="pt") as tensors:
        return any(name.startswith(NOT_OF_A_DENOISER) for name in tensors.keys())  # noqa: SIM118  # no mapping


def _of_pipeline(cls: Any, weights: Weights, dtype_of: Callable[[str], torch.dtype]) -> dict[str, Any]:
    """Every component: what the file lacks comes from the folder."""
    pipe = _read(cls, cls.__name__, weights.files[""], config=str(weights.folder))
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part.to(dtype_of(name))
    return parts


def _component(name: str, file: Path, folder: Path, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    cls = getattr(diffusers, index[name][1], None) if name in index else None
    is_gguf = file.suffix == ".gguf"
    packed = {"quantization_config": diffusers.GGUFQuantizationConfig(compute_dtype=dtype)} if is_gguf else {}
    return _read(cls, name, file, config=str(folder), subfolder=name, dtype=dtype, **packed)


def _read(cls: Any, what: str, file: Path, **options: Any) -> Any:
    if not hasattr(cls, "from_single_file"):
        raise EngineError(f"single_file: diffusers can't load {what} from {file.name}.", "no_single_file")
    return cls.from_single_file(str(file), local_files_only=True, **options)
