"""What the text encoders made of a prompt, remembered in memory and on disk: the same words need not be read twice.

`encode_prompt` is the door to the encoders in nearly every class of diffusers, whatever it takes and returns. So it is
its arguments that are the key, and its result that is kept. A call that gets a picture or a tensor, that draws random
numbers, or that leaves something on the pipeline is let through as it is.
"""

import hashlib
import inspect
import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.catalog.weights import Weights
from engine.files import folders

log = logging.getLogger("wangpd.worker")
MEMORY_BYTES = 256 * 2**20  # of RAM: some dozens of prompts of the largest encoders
SUFFIX = ".safetensors"
SHAPE = "shape"  # the entry of a file's metadata that says how the tensors were nested
# Components that have no part in reading a prompt. The others count as the encoder, and a change of them as another.
_DEAF = re.compile(r"transformer|unet|vae|scheduler|vocoder")
_PLAIN = (str, int, float, type(None))  # bool is an int


class _NotKept(Exception):
    """A value that can't be a key, or can't be kept."""


@dataclass(frozen=True)
class Reading:
    """The result of one call: its tensors, on the CPU, and how they were nested."""

    shape: Any  # JSON: ["tuple", …], ["list", …], ["plain", value], ["tensor", name, True if it lay on the CPU]
    tensors: Mapping[str, torch.Tensor]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def of(cls, result: Any) -> "Reading":
        """Raises _NotKept if there is more in the result than tensors, plain values, tuples and lists."""
        tensors: dict[str, torch.Tensor] = {}
        return cls(_taken_apart(result, tensors), tensors)

    def result(self, device: torch.device) -> Any:
        """The result anew: copies, as a pipeline may write into what it was given."""
        return _put_together(self.shape, self.tensors, device)


def _taken_apart(value: Any, tensors: dict[str, torch.Tensor]) -> list[Any]:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return ["tensor", name, value.device.type == "cpu"]
    if type(value) in (tuple, list):
        return [type(value).__name__, *(_taken_apart(each, tensors) for each in value)]
    if isinstance(value, _PLAIN):
        return ["plain", value]
    raise _NotKept


def _put_together(shape: list[Any], tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    kind, *parts = shape
    if kind == "tensor":
        name, on_cpu = parts
        return tensors[name].to("cpu" if on_cpu else device, copy=True)
    if kind == "plain":
        return parts[0]
    return {"tuple": tuple, "list": list}[kind](_put_together(part, tensors, device) for part in parts)


class Prompts:
    """The readings that are kept: at most MEMORY_BYTES in memory, `disk_bytes` in `folder`; the least used go first.

    Several processes may share a folder. With no `disk_bytes`, nothing is kept anywhere.
    """

    def __init__(self, folder: Path, disk_bytes: int, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder, self._disk_bytes, self._memory_bytes = folder, disk_bytes, memory_bytes
        self._known: OrderedDict[str, Reading] = OrderedDict()
        self.busy: set[type] = set()  # classes that were seen to do more than return a result

    def remember(self, pipe: Any, encoder: str) -> None:
        """Let `pipe.encode_prompt` answer from here what it was asked before, as long as `pipe` lives.

        `encoder` names the weights that read (see `encoder_of`).
        """
        if self._disk_bytes and hasattr(pipe, "encode_prompt") and "encode_prompt" not in vars(pipe):
            pipe.encode_prompt = _Door(self, pipe, encoder)

    def get(self, key: str) -> Reading | None:
        """The reading under this key, or None."""
        reading = self._known.get(key) or self._from_disk(key)
        if reading is not None:
            self._keep(key, reading)
        return reading

    def put(self, key: str, reading: Reading) -> None:
        """Keep it, in memory and on disk. A disk that is full or can't be written is logged, and no fault."""
        self._keep(key, reading)
        try:
            self._to_disk(key, reading)
        except (OSError, SafetensorError) as error:
            log.warning("prompts: %s could not be kept on disk: %s", self._path(key), error)

    def _keep(self, key: str, reading: Reading) -> None:
        self._known[key] = reading
        self._known.move_to_end(key)
        while sum(each.size_bytes for each in self._known.values()) > self._memory_bytes:
            self._known.popitem(last=False)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{SUFFIX}"

    def _from_disk(self, key: str) -> Reading | None:
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                reading = Reading(
                    json.loads(file.metadata()[SHAPE]),
                    {name: file.get_tensor(name).clone() for name in file.keys()},  # noqa: SIM118  # no mapping
                )
                reading.result(torch.device("cpu"))
            os.utime(path)  # it was used: the oldest go first
            return reading
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("prompts: %s is damaged and removed: %s", path, error)
            path.unlink(missing_ok=True)
            return None

    def _to_disk(self, key: str, reading: Reading) -> None:
        if reading.size_bytes > self._disk_bytes:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f".{key}.{os.getpid()}.{threading.get_ident()}.part"
        try:
            save_file(dict(reading.tensors), part, {SHAPE: json.dumps(reading.shape)})
            part.replace(self._path(key))
        finally:
            part.unlink(missing_ok=True)
        folders.trim(self._folder, self._disk_bytes, self._disk_bytes)


class _Door:
    """`encode_prompt` of one pipeline, in front of what is remembered."""

    def __init__(self, store: Prompts, pipe: Any, encoder: str) -> None:
        self.store, self.encoder = store, encoder
        self._pipe, self._read = pipe, pipe.encode_prompt

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        device = self._pipe._execution_device  # asked once: diffusers looks through all layers for it
        key = _key(self._pipe, self._read, [self.encoder, device.type], arguments, named)
        if key is None or type(self._pipe) in self.store.busy:
            return self._read(*arguments, **named)
        reading = self.store.get(key)
        if reading is None:
            result, reading = _first_time(self._pipe, device, partial(self._read, *arguments, **named))
            if reading is None:
                self.store.busy.add(type(self._pipe))
                return result
            self.store.put(key, reading)
        # The first time too, so that the next one can't differ.
        return reading.result(device)


def inherit(pipe: Any, sibling: Any) -> None:
    """Let `sibling`, another class around the components of `pipe`, remember what `pipe` does."""
    door = vars(pipe).get("encode_prompt")
    if isinstance(door, _Door):
        door.store.remember(sibling, door.encoder)


# ---- the key


def encoder_of(pipe: Any, weights: Weights) -> str:
    """What tells the encoders of `pipe` from others: their classes and dtypes, and which files they were read from."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    about = {
        name: (type(part).__name__, str(getattr(part, "dtype", "")))
        for name, part in parts.items()
        if not _DEAF.search(name)
    }
    named = {**_folders(weights.folder), **weights.parts, **weights.files}
    roots = [path for name, path in named.items() if not _DEAF.search(name)]
    versions = [library.__version__ for library in (torch, transformers, diffusers)]
    return _digest([about, versions, [_files(root) for root in sorted(roots)]])


def _folders(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def _files(root: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of each file at or below `root`."""
    paths = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _key(pipe: Any, read: Callable[..., Any], reader: list[str], arguments: Any, named: Any) -> str | None:
    """The name of this call, or None if its result depends on more than plain values. `reader` is who reads, where."""
    if _adapted(pipe):
        return None
    bound = inspect.signature(read).bind(*arguments, **named)
    bound.apply_defaults()
    settings = {name: value for name, value in pipe.config.items() if isinstance(value, _PLAIN)}
    settings.pop("_name_or_path", None)  # where it lies, not what it is
    try:
        return _digest([*reader, type(pipe).__name__, settings, _plain(bound.arguments)])
    except _NotKept:
        return None


def _plain(value: Any) -> Any:
    """The value as JSON can have it. Raises _NotKept."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if type(value) in (tuple, list):
        return [_plain(each) for each in value]
    if isinstance(value, torch.dtype | torch.device):
        return str(value).partition(":")[0]  # cards of a machine compute alike, whatever their number
    if isinstance(value, _PLAIN):
        return value
    raise _NotKept


def _adapted(pipe: Any) -> bool:
    """True while a LoRA works on anything but a denoiser: it changes what the words mean."""
    parts = (part for name, part in pipe.components.items() if not _DEAF.search(name))
    modules = (module for part in parts if isinstance(part, torch.nn.Module) for module in part.modules())
    return any(isinstance(module, BaseTunerLayer) and not module.disable_adapters for module in modules)


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:40]


def _first_time(pipe: Any, device: torch.device, call: Callable[[], Any]) -> tuple[Any, Reading | None]:
    """The result of `call`; and what can be kept of it, if the result is all that it did."""
    held, drawn = dict(vars(pipe)), _drawn(device)
    result = call()
    left = held.keys() != vars(pipe).keys() or any(vars(pipe)[name] is not value for name, value in held.items())
    if left or any(not torch.equal(one, other) for one, other in zip(drawn, _drawn(device), strict=True)):
        return result, None
    try:
        return result, Reading.of(result)
    except _NotKept:
        return result, None


def _drawn(device: torch.device) -> list[torch.Tensor]:
    """Where the random numbers stand."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
