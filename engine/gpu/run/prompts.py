"""A cache of prompt embeddings in RAM: a prompt that comes again is not encoded again.

The key is the arguments of `encode_prompt`, which nearly every class has, and the entry its result. A call that gets a
picture or a tensor, that draws random numbers or that leaves something on the pipeline is passed through.
"""

import inspect
import json
import re
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from engine.catalog.weights import Weights

# Components without a part in encoding a prompt. All others belong to the encoder's identity.
_NO_ENCODER = re.compile(r"transformer|unet|vae|scheduler|vocoder")
_PLAIN = (str, int, float, type(None))  # bool is an int


class Embeddings:
    """The result of one call of `encode_prompt`, with its tensors in RAM."""

    def __init__(self, result: Any) -> None:
        """Raises TypeError if there is more in the result than tensors and plain values."""
        leaves, self._structure = tree_flatten(result)
        if not all(isinstance(leaf, (torch.Tensor, *_PLAIN)) for leaf in leaves):
            raise TypeError
        self.size_bytes = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        self._leaves = [_to(leaf, "cpu", memory_format=torch.contiguous_format) for leaf in leaves]
        self._were_on_cpu = [isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in leaves]

    def on(self, device: torch.device) -> Any:
        """The result: copies on `device`, or on the CPU if they were there, as a pipeline may write into them."""
        pairs = zip(self._leaves, self._were_on_cpu, strict=True)
        return tree_unflatten([_to(leaf, "cpu" if on_cpu else device) for leaf, on_cpu in pairs], self._structure)


def _to(leaf: Any, device: torch.device | str, **layout: Any) -> Any:
    """A copy of a tensor on `device`, or the plain value."""
    return leaf.detach().to(device, copy=True, **layout) if isinstance(leaf, torch.Tensor) else leaf


class PromptCache:
    """At most `size_bytes` of embeddings; the least recently used go first. With 0, nothing is cached."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._entries: OrderedDict[str, Embeddings] = OrderedDict()
        self.uncacheable: set[type] = set()  # pipelines whose `encode_prompt` does more than return a result

    def attach(self, pipe: Any, encoder: str) -> None:
        """Put the cache in front of `pipe.encode_prompt`; `encoder` identifies its weights (see `encoder_of`)."""
        if self._size_bytes and hasattr(pipe, "encode_prompt") and "encode_prompt" not in vars(pipe):
            pipe.encode_prompt = _CachedEncode(self, pipe, encoder)

    def get(self, key: str) -> Embeddings | None:
        """The entry under this key, or None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: str, entry: Embeddings) -> None:
        """Keep the entry, as long as there is room."""
        self._entries[key] = entry
        while sum(each.size_bytes for each in self._entries.values()) > self._size_bytes:
            self._entries.popitem(last=False)


class _CachedEncode:
    def __init__(self, cache: PromptCache, pipe: Any, encoder: str) -> None:
        self.cache, self.encoder = cache, encoder
        self._pipe, self._encode = pipe, pipe.encode_prompt

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        device = self._pipe._execution_device  # asked once: diffusers looks through all layers for it
        key = _key(self._pipe, self._encode, [self.encoder, device.type], arguments, named)
        if key is None or type(self._pipe) in self.cache.uncacheable:
            return self._encode(*arguments, **named)
        if (entry := self.cache.get(key)) is None:
            result, entry = _observed(self._pipe, device, partial(self._encode, *arguments, **named))
            if entry is None:
                self.cache.uncacheable.add(type(self._pipe))
                return result
            self.cache.put(key, entry)
        return entry.on(device)  # the first time too, so that the next one can't differ


def inherit(pipe: Any, sibling: Any) -> None:
    """Let `sibling`, another class around the components of `pipe`, use the same entries."""
    encode = vars(pipe).get("encode_prompt")
    if isinstance(encode, _CachedEncode):
        encode.cache.attach(sibling, encode.encoder)


def encoder_of(pipe: Any, weights: Weights) -> str:
    """Identifies the encoders of `pipe`: their classes and dtypes, and path, size and time of the files they are in."""
    parts = sorted((name, type(part).__name__, str(getattr(part, "dtype", ""))) for name, part in _encoders(pipe))
    own = {path.name: path for path in weights.folder.iterdir() if path.is_dir()}
    roots = {**own, **weights.parts, **weights.files}
    places = (root for name, root in sorted(roots.items()) if not _NO_ENCODER.search(name))
    files = [path for root in places for path in sorted([root, *root.rglob("*")]) if path.is_file()]
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps([parts, states])


def _encoders(pipe: Any) -> list[tuple[str, nn.Module]]:
    parts = [(name, part) for name, part in pipe.components.items() if isinstance(part, nn.Module)]
    return [(name, part) for name, part in parts if not _NO_ENCODER.search(name)]


def _key(pipe: Any, encode: Callable[..., Any], encoder: list[str], arguments: Any, named: Any) -> str | None:
    """None if the result depends on more than plain values."""
    layers = (layer for _, part in _encoders(pipe) for layer in part.modules() if isinstance(layer, BaseTunerLayer))
    if any(not layer.disable_adapters for layer in layers):  # a LoRA that changes the embeddings
        return None
    bound = inspect.signature(encode).bind(*arguments, **named)
    bound.apply_defaults()
    settings = {name: value for name, value in pipe.config.items() if isinstance(value, _PLAIN)}
    settings.pop("_name_or_path", None)  # where it is, not what it is
    parts = [*encoder, type(pipe).__name__, settings, bound.arguments]
    with suppress(TypeError):
        return json.dumps(parts, sort_keys=True, default=_plain)
    return None


def _plain(value: Any) -> str:
    """Raises TypeError for anything else that JSON does not know."""
    if isinstance(value, torch.dtype | torch.device):
        return str(value).partition(":")[0]  # cards of a machine compute alike, whatever their number
    raise TypeError


def _observed(pipe: Any, device: torch.device, encode: Callable[[], Any]) -> tuple[Any, Embeddings | None]:
    """The result of `encode`, and its cache entry if returning that result is all that the call did."""
    attributes, states = dict(vars(pipe)), _random_states(device)
    result = encode()
    now = vars(pipe)
    changed = attributes.keys() != now.keys() or any(now[name] is not value for name, value in attributes.items())
    with suppress(TypeError):
        if not changed and all(map(torch.equal, states, _random_states(device))):
            return result, Embeddings(result)
    return result, None


def _random_states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
