"""What this machine can run; on the daemon's side, so that a setting that can't work is reported at the start."""

import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import rtoml

from engine.catalog.models import Model

AUTO, NONE, GGUF = "auto", "none", "gguf"
QUANTIZATION = "transformer_quantization"


@dataclass(frozen=True)
class Requirement:
    """What a value of a setting needs."""

    package: str = ""  # as it is imported; "": nothing is needed
    install: str = ""  # as pip names it
    backend: str = ""  # of an attention kernel: diffusers' name for it
    exact: bool = False  # of an attention kernel: it does not round to 8 bits
    shareable: bool = False  # of an attention kernel: diffusers can split the tokens among several devices
    devices: Sequence[str] = ("cuda", "mps", "cpu")  # the torch device types on which it works
    capability: Sequence[int] = (0, 0)  # the least compute capability of a CUDA GPU
    instead: str = NONE  # the value to use where it does not work

    @property
    def installed(self) -> bool:
        """Whether the package is there; whether the GPU can run it is known only once it is tried."""
        return not self.package or find_spec(self.package) is not None

    def fault(self, setting: str, value: str) -> str:
        """Why the setting can't have this value without the package, and how to install it; "" if it is there."""
        if self.installed:
            return ""
        return f"{setting}: '{value}' needs a package that is not here; install it: pip install '{self.install}'"


KERNELS, KINDS = (
    {value: Requirement(**needs) for value, needs in table.items()}
    for table in rtoml.load(Path(__file__).with_suffix(".toml")).values()
)
SHAREABLE_KERNELS = (AUTO, *(name for name, kernel in KERNELS.items() if kernel.shareable))


def attention_fault(mode: str) -> str:
    """Why `mode` can't be used on this machine, and how to install what it needs; "" if it can."""
    return "" if mode == AUTO else KERNELS[mode].fault("attention_mode", mode)


def quantization_fault(kind: str, device: str = "auto", capability: tuple[int, int] | None = None) -> str:
    """Why `kind` can't be used on `device`, "auto" or a torch device, and what to do; "" if it can."""
    needs = KINDS[kind]
    if fault := needs.fault(QUANTIZATION, kind):
        return fault
    if device.partition(":")[0] not in ("auto", *needs.devices):
        rule = f"does not work on device '{device}'"
    elif capability is not None and capability < tuple(needs.capability):
        wanted, has = (".".join(map(str, pair)) for pair in (needs.capability, capability))
        rule = f"needs compute capability {wanted}, this card has {has}"
    else:
        return ""
    return f"{QUANTIZATION}: '{kind}' {rule}; set it to \"{needs.instead}\""


def is_gguf(model: Model) -> bool:
    """True if the model's entry names a GGUF file, whose weights are quantised already."""
    return any(file.endswith(".gguf") for file in model.files.values())


def quantization_refusal(kind: str, model: Model) -> str:
    """Why `model` can't run with `kind`, and what to do; "" if it can."""
    if kind != GGUF or is_gguf(model):
        return ""
    return (
        f"{QUANTIZATION}: 'gguf' is configured, and model '{model.id}' has no GGUF file; put one into models_dir,"
        f' with an entry there that says base = "{model.id}" and single_file = "NAME.gguf", or set the key to "int8"'
    )


def hide_unused_packages(kind: str) -> None:
    """Makes the packages of all other kinds impossible to import, and silences torchao; call it before diffusers."""
    # Diffusers and peft import whatever of these is installed: torchao alone costs each start two seconds and 50 MB.
    for name in ("torchao", "torch.utils._pytree"):  # they warn at each import
        logging.getLogger(name).setLevel(logging.ERROR)
    unused = {other.package for other in KINDS.values()} - {"", "gguf", KINDS[kind].package}
    cast("dict[str, object]", sys.modules).update(dict.fromkeys(unused - sys.modules.keys()))


def compile_fault(device: str) -> str:
    """Why blocks can't be compiled for `device` on this machine, and what to do; "" if they can."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for it
    if shutil.which(compiler) is None:
        return (
            f"compile: true needs a C++ compiler, and '{compiler}' is not here; install it, as with: apt install g++,"
            " or set compile = false"
        )
    if device.startswith("cuda") and find_spec("triton") is None:
        return f"compile: true needs triton on device '{device}'; install it: pip install triton"
    return ""


def compile_environment(state_path: Path) -> Mapping[str, str]:
    """The variables that make torch and triton keep compiled code there; they are read when torch is imported."""
    cache = state_path / "compiled"  # it can be deleted at any time: the code is then compiled again
    return {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}


def heads_split(heads: int, count: int) -> bool:
    """True if so many attention heads can be divided among `count` devices: the last one must have some, too."""
    each = -(-heads // count)
    return each * count - heads < each


def team_fault(devices: Sequence[str], attention_mode: str) -> str:
    """Why these devices can't compute a task together, and what to do; "" if they can."""
    kinds = sorted({device.partition(":")[0] for device in devices})
    if len(devices) < 2:
        return 'context_parallel: devices must name those that work together, as in devices = ["cuda:0", "cuda:1"]'
    if len(kinds) > 1:
        return f"context_parallel: devices must be of one kind, and are {' and '.join(kinds)}"
    if kinds == ["cuda"] and len(set(devices)) < len(devices):
        return "context_parallel: devices must name each card once"
    if attention_mode in SHAREABLE_KERNELS:
        return ""
    choice = ", ".join(SHAREABLE_KERNELS)
    return f"context_parallel: attention_mode '{attention_mode}' does not work with it; choose {choice}"
