"""Quantised denoisers: made once from the weights that are installed, and read back from then on.

Only the linear layers of the blocks, nearly all of the weights, are quantised: an error in an embedding or in the last
projection is seen everywhere. `int8` and `fp8` are tensors of torchao, which diffusers moves, saves and loads, and peft
adds LoRAs to; `nf4` is a layer of ours around the numbers of bitsandbytes.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_utils import local_torch_dtype

from engine.capabilities import AUTO, GGUF, KINDS, NONE, is_gguf, quantization_fault, quantization_refusal
from engine.catalog.models import Model
from engine.catalog.weights import Weights
from engine.gpu.load import offloading, pipelines, prepared
from engine.job import EngineError
from engine.planning.work import Parts

log = logging.getLogger("wangpd.worker")
LAYOUT = 1  # raise it when other layers are quantised, or they are written otherwise
FOUR_BIT_BLOCK = 64  # numbers that share a scale


class ModelSource(NamedTuple):
    """What is loaded: the pipeline of `model` for `task`, its denoisers from `weights` in `kind`."""

    model: Model
    task: str
    weights: Weights
    kind: str


def kind_for(model: Model, configured: str, planned: Callable[[], str]) -> str:
    """The kind of weights to load: GGUF if `model` has it, else as configured (auto: `planned`). Raises EngineError."""
    if is_gguf(model):
        return GGUF
    if sentence := quantization_refusal(configured, model):
        raise EngineError(sentence, "no_weights")
    return planned() if configured == AUTO else configured


def load(
    source: ModelSource, device: torch.device, models_dir: Path, *, denoisers_only: bool = False
) -> tuple[Any, Parts]:
    """The pipeline in RAM, and its parts. Raises EngineError if the device can't work with these weights."""
    model, task, weights, kind = source
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if sentence := quantization_fault(kind, device.type, capability):
        raise EngineError(sentence, "no_device")
    make = partial(pipelines.load, model, model.pipelines[task], weights, device, denoisers_only=denoisers_only)
    if kind in (NONE, GGUF):
        pipe = make()
        return pipe, replace(offloading.parts_of(pipe, model), quantization=kind)
    dtype_of = partial(pipelines.dtype_of, model, device)
    what = f"{model.id}.{kind}.{str(dtype_of('transformer')).removeprefix('torch.')}"
    method = ["quantization", LAYOUT, version(KINDS[kind].package), str(model.recipe_loras)]
    folder = prepared.entry(models_dir, what, _sources(weights), method)
    ready = _read(folder, kind, dtype_of)
    pipe = make(ready)
    if ready:
        return pipe, replace(offloading.parts_of(pipe, model), quantization=kind, changed=False)
    started, denoisers = time.monotonic(), offloading.denoisers(pipe)
    for denoiser in denoisers.values():
        quantize(denoiser, kind, device)
    log.info("model %s: denoiser quantized to %s in %.0f s", model.id, kind, time.monotonic() - started)
    parts = replace(offloading.parts_of(pipe, model), quantization=kind, changed=True)
    prepared.publish(folder, parts.denoisers, partial(_write, denoisers))
    return pipe, parts


def _sources(weights: Weights) -> list[Path]:
    own = {path.name: path for path in weights.folder.iterdir() if path.is_dir()}
    folders = [folder for name, folder in {**own, **weights.parts}.items() if offloading.is_denoiser(name)]
    inside = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    return [*sorted(inside), *weights.files.values(), *weights.loras]


@torch.no_grad()
def quantize(denoiser: Any, kind: str, device: torch.device) -> None:
    """Quantise the linear layers of the denoiser's blocks, each on `device`; afterwards they are in RAM."""
    if kind == "nf4":
        for name in list(layers(denoiser)):  # names alone, so that none of the wide layers stays on the device
            denoiser.set_submodule(name, FourBit.of(denoiser.get_submodule(name).to(device)).to("cpu"))
        return
    from torchao.quantization import quantize_

    recipe = _torchao_config(kind)
    for layer in layers(denoiser).values():
        quantize_(layer.to(device), recipe)
        layer.to("cpu")
    config = diffusers.TorchAoConfig(recipe)  # leave what diffusers leaves: peft and `save_pretrained` ask it
    denoiser.hf_quantizer = diffusers.quantizers.DiffusersAutoQuantizer.from_config(config)
    denoiser.hf_quantizer.validate_environment()
    denoiser.register_to_config(quantization_config=config)


def layers(denoiser: Any) -> dict[str, nn.Linear]:
    """Name → linear layer of the denoiser's blocks. One that is kept in float32 is kept for its precision."""
    lists = [f"{name}." for name, part in denoiser.named_modules() if isinstance(part, nn.ModuleList)]
    return {
        name: part
        for name, part in denoiser.named_modules()
        if isinstance(part, nn.Linear)
        and name.startswith(tuple(lists))
        and "embed" not in name  # some embeddings are in lists as blocks are
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


class FourBit(nn.Linear):
    """A linear layer whose weight is stored in 4-bit NormalFloat numbers, 64 of which share a scale.

    `weight` is what they widen to, computed whenever it is asked for, as for each product. The layer that bitsandbytes
    has keeps the scales where group offload does not move them, and diffusers would not load it without a GPU.
    """

    def __init__(self, layer: nn.Linear, packed: torch.Tensor, scales: torch.Tensor) -> None:
        """`layer` in 4 bits. packed: (out·in/2, 1) uint8, scales: (out·in/64,) float32, both rounded up."""
        nn.Module.__init__(self)  # not Linear's: it would make a weight
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.packed, self.scales = nn.Buffer(packed), nn.Buffer(scales)
        self.widened = layer.weight.dtype

    @classmethod
    def of(cls, layer: nn.Linear) -> "FourBit":
        """The layer with its weight rounded."""
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(layer.weight, blocksize=FOUR_BIT_BLOCK, quant_type="nf4")
        return cls(layer, packed, state.absmax)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """(out, in) in the dtype that the layer had."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape = torch.Size((self.out_features, self.in_features))
        state = QuantState(self.scales, shape, blocksize=FOUR_BIT_BLOCK, quant_type="nf4", dtype=self.widened)
        wide: torch.Tensor = dequantize_4bit(self.packed, state)
        return wide


def _write(denoisers: Mapping[str, Any], folder: Path) -> None:
    for name, denoiser in denoisers.items():
        denoiser.save_pretrained(folder / name, max_shard_size=prepared.SHARD_BYTES)


def _read(folder: Path, kind: str, dtype_of: Callable[[str], torch.dtype]) -> dict[str, Any]:
    """Component → denoiser as it was written, its weights mapped from the files; nothing if they are not all there."""
    if not folder.is_dir():
        return {}
    try:
        return {part.name: _denoiser(part, kind, dtype_of(part.name)) for part in sorted(folder.iterdir())}
    except (OSError, ValueError, LookupError, RuntimeError, AttributeError, SafetensorError) as error:
        log.warning("quantized weights in %s can't be read and are made again: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return {}


def _denoiser(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    if KINDS[kind].package == "torchao":
        return pipelines.component(folder.name, folder, dtype)
    # Diffusers has no quantizer for layers of ours: `from_pretrained` would look for the weights that they replace.
    with local_torch_dtype(dtype), accelerate.init_empty_weights():  # in it, what the class computes for itself
        cls = pipelines.component_class(folder)
        denoiser = cls.from_config(cls.load_config(folder))
    state = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for name in [name.removesuffix(".packed") for name in state if name.endswith(".packed")]:
        packed, scales = state[f"{name}.packed"], state[f"{name}.scales"]
        denoiser.set_submodule(name, FourBit(denoiser.get_submodule(name), packed, scales))
    denoiser.requires_grad_(False).load_state_dict(state, assign=True)
    return denoiser.eval()
