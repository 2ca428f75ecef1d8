"""Weights that lie in float32 are rewritten once in the dtype that they are computed in. The user's files stay.

To cast them at each load reads twice the bytes and holds both dtypes in memory. The copy of a component lies in
`models_dir/.converted` under a name that tells what it was made from, so a file that changes gets another copy.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from safetensors import safe_open

from engine.catalog.weights import INDEX, Weights, component_files, has_weights, named_parts
from engine.planning.machine import GIB

log = logging.getLogger("wangpd.worker")
STORE = ".converted"
LAYOUT = 1  # part of a copy's name: raise it when copies are made otherwise
WORTH = 0.1  # least share of a component's bytes that must shrink: below it, a copy saves next to nothing
ROOM_BYTES = 2 * GIB  # that must stay free on the disk beside what is written

DtypeOf = Callable[[str], torch.dtype]
_WIDE = {"F32": 4, "F64": 8}
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16"}


def cast(weights: Weights, variant: str | None, dtype_of: DtypeOf, models_dir: Path) -> Weights:
    """`weights`, with a copy in its dtype in the place of each component that lies in float32 and is computed in less.

    `dtype_of` a component is what it is computed in. Copies that are missing are made first; where that can't be, the
    component stays as it is, and the log says why.
    """
    index = json.loads((weights.folder / INDEX).read_text())
    own = {name: weights.folder / name for name in named_parts(index) if name not in weights.parts}
    copies: dict[str, Path] = {}
    for name, folder in {**own, **weights.parts}.items():
        if has_weights(name) and dtype_of(name) in _NAMES and folder.is_dir():
            component = Component(folder, variant, dtype_of(name), str((index.get(name) or ["", ""])[1]))
            if (copy := _copied(component, models_dir / STORE)) is not None:
                copies[name] = copy
    parts = {name: copies.get(name, folder) for name, folder in weights.parts.items()}
    inner = {name: copy for name, copy in copies.items() if name in own}
    folder = _mirror(weights.folder, inner, models_dir / STORE) if inner else weights.folder
    return replace(weights, folder=folder, parts=parts)


@dataclass(frozen=True)
class Component:
    """A folder with a configuration and safetensors, the dtype that it is wanted in, and its class in the index."""

    folder: Path
    variant: str | None
    dtype: torch.dtype
    cls: str = ""

    def files(self) -> list[Path]:
        """The files that a load reads."""
        names = [path.name for path in self.folder.iterdir() if path.is_file()]
        return [self.folder / name for name in sorted(component_files(names, self.variant))]

    def shards(self) -> list[Path]:
        return [path for path in self.files() if path.suffix == ".safetensors"]

    def store_name(self) -> str:
        """The name of its copy, which ends with what it is made from."""
        about = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files()]
        return f"{self.family()}{_digest([LAYOUT, self.cls, about])}"

    def family(self) -> str:
        """How the names of its copies begin, also of those that are out of date."""
        return f"{self.folder.parent.name}.{self.folder.name}.{str(self.dtype).removeprefix('torch.')}."


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def _copied(component: Component, store: Path) -> Path | None:
    """The folder of the component's copy, made if it is not there; None if it needs none or can't have one."""
    try:
        copy = store / component.store_name()
        if copy.is_dir():
            return copy
        headers = {path: _header(path) for path in component.shards()}
        if not _is_worth_it(headers) or (kept := _kept_in_float32(component)) is None:
            return None
        with alone(store):
            return copy if copy.is_dir() or _convert(component, headers, kept, copy) else None
    except Exception as error:  # a class of a library fails in its own ways, and the weights load without this
        log.warning("float32 weights in %s are not rewritten: %s", component.folder, error)
        return None


def _is_worth_it(headers: Mapping[Path, Mapping[str, Any]]) -> bool:
    sizes = [(entry["dtype"] in _WIDE, _size(entry)) for header in headers.values() for entry in header.values()]
    wide = sum(size for is_wide, size in sizes if is_wide)
    return bool(wide) and wide >= WORTH * sum(size for _, size in sizes)


@contextmanager
def alone(store: Path) -> Iterator[None]:
    """No other process writes there within the block, so what is unfinished there is of a process that died."""
    store.mkdir(parents=True, exist_ok=True)
    with (store / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in store.glob("*.part"):
            shutil.rmtree(left)
        yield


def _convert(component: Component, headers: Mapping[Path, Any], kept: re.Pattern[str], copy: Path) -> bool:
    """Write the copy; it has its name only when it is whole. False if the disk has no room."""
    laid_out = {path: _layout(header, component.dtype, kept) for path, header in headers.items()}
    size_bytes = sum(_size(entry) for layout in laid_out.values() for entry in layout.values())
    free_bytes = shutil.disk_usage(copy.parent).free
    before = sum(path.stat().st_size for path in headers)
    change = f"{component.folder} in {component.dtype}: {before / GIB:.2f} to {size_bytes / GIB:.2f} GiB"
    if free_bytes < size_bytes + ROOM_BYTES:
        log.warning("not rewriting %s: %.2f GiB are free on the disk", change, free_bytes / GIB)
        return False
    log.info("rewriting %s, once", change)
    part = copy.with_name(f"{copy.name}.part")
    part.mkdir()
    for path in component.files():
        if path in laid_out:
            _write(path, laid_out[path], part / path.name)
        else:
            shutil.copyfile(path, part / path.name)
    part.rename(copy)
    for old in copy.parent.glob(f"{component.family()}*"):
        if old != copy:
            shutil.rmtree(old)
    return True


# ---- what stays in float32


def _kept_in_float32(component: Component) -> re.Pattern[str] | None:
    """What finds the names of tensors that the class computes in float32 whatever it is told.

    None if the class is unknown: its weights are better left alone.
    """
    config = json.loads((component.folder / "config.json").read_text())
    name = config.get("_class_name") or component.cls or (config.get("architectures") or [""])[0]
    if own := getattr(diffusers, name, None):
        kept = own._keep_in_fp32_modules or []
    elif other := getattr(transformers, name, None):
        kept = _kept_by_transformers(other, component)
    else:
        return None
    patterns = [pattern.replace("*", ".*") for pattern in ([kept] if isinstance(kept, str) else kept)]
    return re.compile("|".join(patterns) or r"$^")


def _kept_by_transformers(cls: Any, component: Component) -> list[str]:
    """The patterns of the class and of those inside it, and what is made in float32."""
    with accelerate.init_empty_weights():
        empty = cls._from_config(cls.config_class.from_pretrained(component.folder), dtype=component.dtype)
    made = [re.escape(name) for name, tensor in empty.state_dict().items() if tensor.dtype == torch.float32]
    loosely = empty._keep_in_fp32_modules if component.dtype == torch.float16 else ()
    return [*made, *(loosely or ()), *(empty._keep_in_fp32_modules_strict or ())]


# ---- files


def _header(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file: name → dtype, shape and data_offsets."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _size(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end - begin)


def _layout(header: Mapping[str, Any], dtype: torch.dtype, kept: re.Pattern[str]) -> dict[str, Any]:
    """The header of the copy, tensors in the order in which they are written."""
    entries: list[tuple[int, str, str, list[int], int]] = []
    for name, entry in header.items():
        shrinks = entry["dtype"] in _WIDE and not kept.search(name)
        kind = _NAMES[dtype] if shrinks else entry["dtype"]
        size = _size(entry) // _WIDE[entry["dtype"]] * dtype.itemsize if shrinks else _size(entry)
        count = max(1, _numel(entry["shape"]))
        entries.append((-(size // count), name, kind, entry["shape"], size))
    layout, offset = {}, 0
    for _, name, kind, shape, size in sorted(entries):  # the widest numbers first, so that each lies on its own width
        layout[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return layout


def _numel(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def _write(source: Path, layout: Mapping[str, Any], target: Path) -> None:
    """Write the tensors of `source` as `layout` says, one after the other: none but one is in memory."""
    header = json.dumps({"__metadata__": {"format": "pt"}, **layout}).encode()
    header += b" " * (-len(header) % 8)
    with safe_open(source, framework="pt") as tensors, target.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, entry in layout.items():
            dtype = next((dtype for dtype, kind in _NAMES.items() if kind == entry["dtype"]), None)
            tensor = tensors.get_tensor(name)
            narrow = tensor.to(dtype) if dtype else tensor
            file.write(narrow.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # the name that it gets must not outlive its bytes


def _mirror(folder: Path, copies: Mapping[str, Path], store: Path) -> Path:
    """A folder that looks like `folder`, with links to the copies and to what needs none."""
    mirror = store / f"{folder.name}.{_digest([str(folder), sorted(path.name for path in copies.values())])}"
    wanted = {path.name: copies.get(path.name, path) for path in folder.iterdir()}
    with alone(store):
        if not mirror.is_dir() or {path.name: path.readlink() for path in mirror.iterdir()} != wanted:
            shutil.rmtree(mirror, ignore_errors=True)
            mirror.mkdir()
            for name, target in wanted.items():
                (mirror / name).symlink_to(target)
    return mirror
