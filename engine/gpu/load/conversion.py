"""Weights stored in float32, rewritten once in the dtype that they are computed in.

To cast them at each load reads twice the bytes, and holds in RAM what could stay in the files.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
    """`weights`, with a copy for each component that is stored in float32 and computed in less.

    `dtype_of` a component is what it is computed in. Copies that are missing are made first; where that can't be, the
    component stays as it is, and the log says why.
    """
    if pipelines.is_whole(weights):
        return weights
    from_files = {*weights.files, *(DENOISER if "" in weights.files else ())}
    index = json.loads((weights.folder / INDEX).read_text())
    folders = {**{name: weights.folder / name for name in named_parts(index)}, **weights.parts}
    copies = {
        name: copy
        for name, folder in folders.items()
        if has_weights(name) and name not in from_files and dtype_of(name) not in WIDE and folder.is_dir()
        if (copy := _copy(Component(folder, variant, dtype_of(name), index.get(name)), models_dir))
    }
    return replace(weights, parts={**weights.parts, **copies})


@dataclass(frozen=True)
class Component:
    """A folder with a configuration and safetensors, the dtype that it is wanted in, and its entry in the index."""

    folder: Path
    variant: str | None
    dtype: torch.dtype
    indexed: Any = None

    def files(self) -> list[Path]:
        """The files that a load reads."""
        names = [path.name for path in self.folder.iterdir() if path.is_file()]
        return [self.folder / name for name in sorted(component_files(names, self.variant))]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, mapped from the files: not read before it is used."""
        for path in self.files():
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # no mapping
                        yield name, file.get_tensor(name)


def _copy(component: Component, models_dir: Path) -> Path | None:
    """The folder of the component's copy, made if it is not there; None if it needs none or can't have one."""
    folder, dtype = component.folder, component.dtype
    try:
        what = f"{folder.parent.name}.{folder.name}.{str(dtype).removeprefix('torch.')}"
        copy = prepared.entry(models_dir, what, component.files(), ["conversion", LAYOUT, component.indexed])
        if copy.is_dir():
            return copy
        sizes = [(tensor.nbytes, tensor.dtype in WIDE) for _, tensor in component.tensors()]
        before, wide = sum(size for size, _ in sizes), sum(size for size, is_wide in sizes if is_wide)
        if wide <= WORTH * before or (cls := pipelines.component_class(folder, component.indexed)) is None:
            return None
        log.info("rewriting %s in %s once: %.2f GiB", folder, dtype, before / GIB)
        return copy if prepared.publish(copy, before - wide // 2, partial(_write, component, cls)) else None
    except Exception as error:  # a class of a library fails in its own ways, and the weights load without this
        log.warning("float32 weights in %s are not rewritten: %s", folder, error)
        return None


def _write(component: Component, cls: Any, folder: Path) -> None:
    """Write the copy, of which no more than a shard is in memory; `save_pretrained` would need all of it there."""
    for path in component.files():
        if path.suffix != ".safetensors" and ".index." not in path.name:
            shutil.copyfile(path, folder / path.name)
    stem = "diffusion_pytorch_model" if issubclass(cls, diffusers.ModelMixin) else "model"
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(component, _kept_in_float32(cls, component))):
        file = f"{stem}-{number:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _shards(component: Component, kept: re.Pattern[str]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of the copy, as many at a time as fit a file."""
    shard: dict[str, torch.Tensor] = {}
    size_bytes = 0
    for name, stored in component.tensors():
        tensor = stored.to(component.dtype) if stored.dtype in WIDE and not kept.search(name) else stored
        if shard and size_bytes + tensor.nbytes > prepared.SHARD_BYTES:
            yield shard
            shard.clear()  # whoever got it still refers to it
            size_bytes = 0
        shard[name] = tensor
        size_bytes += tensor.nbytes
    yield shard


def _kept_in_float32(cls: Any, component: Component) -> re.Pattern[str]:
    """Matches the names of tensors that the class computes in float32, whatever dtype it is loaded in."""
    if issubclass(cls, diffusers.ModelMixin):
        named = cls._keep_in_fp32_modules or []
        kept = [named] if isinstance(named, str) else named
    else:  # transformers': the patterns of the class and of those inside it, and what is made in float32
        with accelerate.init_empty_weights():
            empty = cls._from_config(cls.config_class.from_pretrained(component.folder), dtype=component.dtype)
        made = [re.escape(name) for name, tensor in empty.state_dict().items() if tensor.dtype == torch.float32]
        loosely = empty._keep_in_fp32_modules if component.dtype == torch.float16 else ()
        kept = [*made, *(loosely or ()), *(empty._keep_in_fp32_modules_strict or ())]
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in kept) or r"$^")
