"""Quantised denoisers: made once of the weights that are installed, written beside them, and read back from then on.

The linear layers of the blocks are nearly all of a denoiser's weights, and the only ones that are quantised: an error
in an embedding or in the last projection is seen everywhere. `int8` and `fp8` are tensors of torchao, which diffusers
moves and peft adds LoRAs to; `nf4` is a layer of ours around the numbers of bitsandbytes.

They lie in `models_dir/.quantized` under a name that tells what they were made of, so weights that change are
quantised anew.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from engine.capabilities import AUTO, GGUF, KINDS, is_gguf, quantization_fault, quantization_refusal
from engine.catalog.models import Model
from engine.catalog.weights import Weights
from engine.gpu.load import offloading, pipelines, single_file
from engine.gpu.load.conversion import ROOM_BYTES, alone
from engine.job import EngineError
from engine.planning.machine import GIB
from engine.planning.work import Parts

log = logging.getLogger("wangpd.worker")
STORE = ".quantized"
LAYOUT = 1  # part of a folder's name: raise it when other layers are quantised, or they are written otherwise
SHARD_BYTES = 2**31  # of a file: what is written is in memory twice
FOUR_BIT_BLOCK = 64  # numbers that share a scale
FOUR_BIT_LAYER = ".packed"  # how the name of such a layer's numbers ends
NOT_OF_A_BLOCK = "embed"  # in the name of a layer: some embeddings stand in lists as blocks do

State = dict[str, torch.Tensor]


def kind_for(model: Model, configured: str, planned: Callable[[], str]) -> str:
    """The kind of weights with which `model` is to run; `planned` tells it where `auto` is configured.

    Weights from a GGUF file are used as they are. Raises EngineError if the model can't be what is configured.
    """
    if is_gguf(model):
        return GGUF
    if sentence := quantization_refusal(configured, model):
        raise EngineError(sentence, "no_weights")
    return planned() if configured == AUTO else configured


def load(
    model: Model,
    task: str,
    weights: Weights,
    device: torch.device,
    *,
    kind: str,
    models_dir: Path,
    denoisers_only: bool = False,
) -> tuple[Any, Parts]:
    """The pipeline for `task` with its denoisers in `kind`, lying in RAM, and what its parts weigh.

    With `denoisers_only` it has nothing but them and a scheduler. Raises EngineError if the device can't compute with
    that kind.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if sentence := quantization_fault(kind, device.type, capability):
        raise EngineError(sentence, "no_device")
    without = pipelines.others(weights) if denoisers_only else []
    if kind not in _METHODS:
        pipe = pipelines.load(model, model.pipelines[task], weights, device, without=without)
        return pipe, replace(offloading.parts_of(pipe, model), quantization=kind)
    folder = models_dir / STORE / _name(model, kind, weights, device)
    ready = _read(folder, kind)
    pipe = pipelines.load(model, model.pipelines[task], _without(weights, ready), device, ready, without=without)
    if not ready:
        _quantize(pipe, model, kind, device)
        _keep(offloading.denoisers(pipe), folder)
    return pipe, replace(offloading.parts_of(pipe, model), quantization=kind, changed=not ready)


def _without(weights: Weights, ready: Mapping[str, Any]) -> Weights:
    """`weights` but those that `ready` replaces."""
    if not ready:
        return weights
    files = {name: path for name, path in weights.files.items() if name not in ready}
    if "" in files and not single_file.is_whole(files[""]):
        del files[""]
    return replace(weights, files=files, parts={n: path for n, path in weights.parts.items() if n not in ready})


# ---- how a layer is quantised


@torch.no_grad()
def _quantize(pipe: Any, model: Model, kind: str, device: torch.device) -> None:
    """Quantise the denoisers where they lie, layer by layer on `device`, which is faster than the CPU."""
    started, parts = time.monotonic(), offloading.denoisers(pipe).values()
    before = sum(map(offloading.size_bytes, parts))
    for denoiser in parts:
        quantize(denoiser, kind, device)
    after, seconds = sum(map(offloading.size_bytes, parts)), time.monotonic() - started
    told = (model.id, kind, before / GIB, after / GIB, seconds)
    log.info("model %s: denoiser quantized to %s, %.2f to %.2f GiB in %.0f s", *told)


def quantize(denoiser: Any, kind: str, device: torch.device) -> None:
    """Quantise the linear layers of the denoiser's blocks, each on `device`; afterwards they lie in RAM."""
    for name, layer in layers(denoiser).items():
        denoiser.set_submodule(name, _METHODS[kind](layer.to(device)).to("cpu"))
    _tell_diffusers(denoiser, kind)


def layers(denoiser: Any) -> dict[str, nn.Linear]:
    """Name → linear layer of the denoiser's blocks. One that is kept in float32 is kept for its precision."""
    lists = [f"{name}." for name, part in denoiser.named_modules() if isinstance(part, nn.ModuleList)]
    return {
        name: part
        for name, part in denoiser.named_modules()
        if isinstance(part, nn.Linear)
        and name.startswith(tuple(lists))
        and NOT_OF_A_BLOCK not in name
        and part.weight.dtype == denoiser.dtype
    }


def _torchao_config(kind: str) -> Any:
    """Without the settings for compiling that torchao recommends: they would lower the precision of all products."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, PerRow

    if kind == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    broken = (torch.version.cuda or "").startswith("12.9")  # its library fails at some sizes with fast accumulation
    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), mm_config=Float8MMConfig(use_fast_accum=not broken), set_inductor_config=False
    )


def _in_eight_bits(kind: str, layer: nn.Linear) -> nn.Linear:
    from torchao.quantization import quantize_

    quantize_(layer, _torchao_config(kind))
    return layer


class FourBit(nn.Linear):
    """A linear layer whose weight lies in 4-bit NormalFloat numbers, 64 of which share a scale.

    `weight` is what they widen to, computed whenever it is asked for, as for each product. The layer that bitsandbytes
    has keeps the scales where group offload does not move them, and diffusers would not load it without a GPU.
    """

    def __init__(self, layer: nn.Linear, packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        """packed: (out·in/2, 1) uint8, scales: (out·in/64,) float32, both rounded up; `dtype` is the weight's."""
        nn.Module.__init__(self)  # not Linear's: it would make a weight
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.packed, self.scales = nn.Buffer(packed), nn.Buffer(scales)
        self.widened = dtype

    @classmethod
    def of(cls, layer: nn.Linear) -> "FourBit":
        """The layer with its weight rounded."""
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(layer.weight, blocksize=FOUR_BIT_BLOCK, quant_type="nf4")
        return cls(layer, packed, state.absmax, layer.weight.dtype)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """(out, in) in the dtype that the layer had."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape = torch.Size((self.out_features, self.in_features))
        state = QuantState(self.scales, shape, blocksize=FOUR_BIT_BLOCK, quant_type="nf4", dtype=self.widened)
        wide: torch.Tensor = dequantize_4bit(self.packed, state)
        return wide


_METHODS: Mapping[str, Callable[[nn.Linear], nn.Linear]] = {
    "int8": lambda layer: _in_eight_bits("int8", layer),
    "fp8": lambda layer: _in_eight_bits("fp8", layer),
    "nf4": FourBit.of,
}


def _tell_diffusers(denoiser: Any, kind: str) -> None:
    """Leave on the denoiser what diffusers leaves there; peft asks it how to treat torchao's tensors."""
    if KINDS[kind].package == "torchao":
        config = diffusers.TorchAoConfig(_torchao_config(kind))
        denoiser.hf_quantizer = diffusers.quantizers.DiffusersAutoQuantizer.from_config(config)


# ---- where they are kept


def _name(model: Model, kind: str, weights: Weights, device: torch.device) -> str:
    """The name of the folder, which ends with what it is made of: files by name, size and time, and the package."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _sources(weights)]
    about = [LAYOUT, version(KINDS[kind].package), str(model.recipe_loras), files]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    return f"{_family(model, kind, device)}{digest}"


def _family(model: Model, kind: str, device: torch.device) -> str:
    """How the names of the model's folders of this kind begin, also of those that are out of date."""
    dtype = str(pipelines.dtype_of(model, device, "transformer")).removeprefix("torch.")
    return f"{model.id}.{kind}.{dtype}."


def _sources(weights: Weights) -> list[Path]:
    """The files that the denoisers come from."""
    own = {path.name: path for path in weights.folder.iterdir() if path.is_dir()}
    folders = [folder for name, folder in {**own, **weights.parts}.items() if offloading.is_denoiser(name)]
    inside = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    return [*sorted(inside), *weights.files.values(), *weights.loras]


def _keep(denoisers: Mapping[str, Any], folder: Path) -> None:
    """Write the denoisers into `folder`, which has its name only when it is whole; what it replaces is deleted.

    What can't be written is quantised anew at the next load, and the log says why.
    """
    size_bytes = sum(map(offloading.size_bytes, denoisers.values()))
    try:
        with alone(folder.parent):
            if folder.is_dir():  # another worker was faster
                return
            free_bytes = shutil.disk_usage(folder.parent).free
            if free_bytes < size_bytes + ROOM_BYTES:
                log.warning("quantized weights are not kept: %.1f GiB are free on the disk", free_bytes / GIB)
                return
            _write(denoisers, folder)
            family = folder.name.rpartition(".")[0]
            for old in set(folder.parent.glob(f"{family}.*")) - {folder}:
                shutil.rmtree(old)
    except OSError as error:
        log.warning("quantized weights are not kept: %s", error)


def _write(denoisers: Mapping[str, Any], folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.part")
    for name, denoiser in denoisers.items():
        (part / name).mkdir(parents=True)
        denoiser.save_config(part / name)
        about = {"dtype": str(denoiser.dtype).removeprefix("torch.")}
        for number, tensors in enumerate(_shards(denoiser)):
            plain, wrappers = _taken_apart(tensors)
            path = part / name / f"{number:05}.safetensors"
            save_file(plain, path, {**about, **wrappers})
            with path.open("rb") as file:
                os.fsync(file.fileno())  # the name that the folder gets must not outlive its bytes
    part.rename(folder)


def _shards(denoiser: Any) -> Iterator[State]:
    """The tensors of the denoiser, parted into as many as fit a file."""
    shard: State = {}
    size_bytes = 0
    for name, tensor in denoiser.state_dict().items():
        if shard and size_bytes + offloading.tensor_bytes(tensor) > SHARD_BYTES:
            yield shard
            shard, size_bytes = {}, 0
        shard[name] = tensor
        size_bytes += offloading.tensor_bytes(tensor)
    yield shard


def _taken_apart(tensors: State) -> tuple[State, dict[str, str]]:
    """Plain tensors alone, and what puts torchao's together again."""
    wrapped = {name: tensor for name, tensor in tensors.items() if offloading.inner_tensors(tensor)}
    plain = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in wrapped}
    if not wrapped:
        return plain, {}
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    inner, about = flatten_tensor_state_dict(wrapped)
    return {**plain, **inner}, about


def _put_together(tensors: State, about: Mapping[str, str]) -> State:
    """What `_taken_apart` has made two things of."""
    if "tensor_names" not in about:
        return tensors
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    whole, others = unflatten_tensor_state_dict(tensors, about)
    return {**others, **whole}


def _read(folder: Path, kind: str) -> dict[str, Any]:
    """Component → denoiser as it was written, its weights mapped from the files; nothing if they are not all there."""
    if not folder.is_dir():
        return {}
    try:
        return {part.name: _denoiser(part, kind) for part in sorted(folder.iterdir())}
    except (OSError, ValueError, LookupError, RuntimeError, AttributeError, SafetensorError) as error:
        log.warning("quantized weights in %s can't be read and are made anew: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return {}


def _denoiser(folder: Path, kind: str) -> Any:
    """Raises what is caught above."""
    state: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            state |= _put_together({name: file.get_tensor(name) for name in file.keys()}, about)  # noqa: SIM118
    dtype = getattr(torch, about["dtype"])
    denoiser = _empty(folder, dtype)
    for name in [name.removesuffix(FOUR_BIT_LAYER) for name in state if name.endswith(FOUR_BIT_LAYER)]:
        packed, scales = state[f"{name}{FOUR_BIT_LAYER}"], state[f"{name}.scales"]
        denoiser.set_submodule(name, FourBit(denoiser.get_submodule(name), packed, scales, dtype))
    denoiser.requires_grad_(False).load_state_dict(state, assign=True)
    _tell_diffusers(denoiser, kind)
    return denoiser.eval()


def _empty(folder: Path, dtype: torch.dtype) -> Any:
    """A denoiser without weights. What it computes for itself is in the dtype in which diffusers would make it."""
    config = json.loads((folder / "config.json").read_text())
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with accelerate.init_empty_weights():
            return getattr(diffusers, config["_class_name"]).from_config(config)
    finally:
        torch.set_default_dtype(usual)
