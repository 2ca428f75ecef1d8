"""Weights stored in float32, rewritten once in the dtype that they are computed in.

To cast them at each load reads twice the bytes, and holds in RAM what could stay in the files.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.catalog.weights import DENOISER, INDEX, Weights, component_files, has_weights, named_parts
from engine.gpu.load import pipelines, prepared
from engine.planning.machine import GIB

log = logging.getLogger("wangpd.worker")
LAYOUT = 1  # raise it when copies are made otherwise
WORTH = 0.1  # least share of float32 in a component's bytes: below it, a copy saves next to nothing
WIDE = (torch.float32, torch.float64)


def cast(weights: Weights, variant: str | None, dtype_of: Callable[[str], torch.dtype], models_dir: Path) -> Weights:
    """`weights`, with copies, made if need be, of the components in float32 that `dtype_of` wants in less."""
    if pipelines.is_whole(weights):
        return weights
    from_files = {*weights.files, *(DENOISER if "" in weights.files else ())}
    index = json.loads((weights.folder / INDEX).read_text())
    folders = {**{name: weights.folder / name for name in named_parts(index)}, **weights.parts}
    copies = {
        name: copy
        for name, folder in folders.items()
        if has_weights(name) and name not in from_files and dtype_of(name) not in WIDE and folder.is_dir()
        if (copy := _copy(folder, variant, dtype_of(name), index.get(name), models_dir))
    }
    return replace(weights, parts={**weights.parts, **copies})


def _copy(folder: Path, variant: str | None, dtype: torch.dtype, indexed: Any, models_dir: Path) -> Path | None:
    """The copy of a component, made if it is not there; None if it needs none or can't have one."""
    try:
        names = component_files([path.name for path in folder.iterdir() if path.is_file()], variant)
        files = [folder / name for name in sorted(names)]
        what = f"{folder.parent.name}.{folder.name}.{str(dtype).removeprefix('torch.')}"
        copy = prepared.entry(models_dir, what, files, ["conversion", LAYOUT, indexed])
        if copy.is_dir():
            return copy
        sizes = [(tensor.nbytes, tensor.dtype in WIDE) for _, tensor in _tensors(files)]
        before, wide = sum(size for size, _ in sizes), sum(size for size, is_wide in sizes if is_wide)
        if wide <= WORTH * before or (cls := pipelines.component_class(folder, indexed)) is None:
            return None
        log.info("rewriting %s in %s once: %.2f GiB", folder, dtype, before / GIB)
        return copy if prepared.publish(copy, before - wide // 2, partial(_write, cls, files, dtype)) else None
    except Exception as error:  # a class of a library fails in its own ways, and the weights load without this
        log.warning("float32 weights in %s are not rewritten: %s", folder, error)
        return None


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, mapped from the files: not read before it is used."""
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    yield name, file.get_tensor(name)


def _write(cls: Any, files: list[Path], dtype: torch.dtype, folder: Path) -> None:
    """Write the copy, of which no more than a shard is in memory; `save_pretrained` would need all of it there."""
    for path in files:
        if path.suffix != ".safetensors" and ".index." not in path.name:
            shutil.copyfile(path, folder / path.name)
    stem = "diffusion_pytorch_model" if issubclass(cls, diffusers.ModelMixin) else "model"
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(files, dtype, _kept_in_float32(cls, files[0].parent, dtype))):
        file = f"{stem}-{number:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _shards(files: list[Path], dtype: torch.dtype, kept: re.Pattern[str]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size_bytes = 0
    for name, stored in _tensors(files):
        tensor = stored.to(dtype) if stored.dtype in WIDE and not kept.search(name) else stored
        if shard and size_bytes + tensor.nbytes > prepared.SHARD_BYTES:
            yield shard
            shard.clear()  # whoever got it still refers to it
            size_bytes = 0
        shard[name] = tensor
        size_bytes += tensor.nbytes
    yield shard


def _kept_in_float32(cls: Any, folder: Path, dtype: torch.dtype) -> re.Pattern[str]:
    """Matches the names of tensors that the class computes in float32, whatever dtype it is loaded in."""
    if issubclass(cls, diffusers.ModelMixin):
        named = cls._keep_in_fp32_modules or []
        kept = [named] if isinstance(named, str) else named
    else:  # transformers': the patterns of the class and of those inside it, and what is made in float32
        with accelerate.init_empty_weights():
            empty = cls._from_config(cls.config_class.from_pretrained(folder), dtype=dtype)
        made = [re.escape(name) for name, tensor in empty.state_dict().items() if tensor.dtype == torch.float32]
        loosely = empty._keep_in_fp32_modules if dtype == torch.float16 else ()
        kept = [*made, *(loosely or ()), *(empty._keep_in_fp32_modules_strict or ())]
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in kept) or r"$^")
