"""The kinds of quantised weights that can be configured, the package that each needs, and where each works.

Here, on the daemon's side, so that a kind that can't work stops the start and not the first task.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast

from engine.catalog import Model

KEY = "transformer_quantization"
NONE, AUTO, GGUF = "none", "auto", "gguf"
TALKATIVE = ("torchao", "torch.utils._pytree")  # at each import, of what this machine can't do and needn't
EVERYWHERE = ("cuda", "mps", "cpu")


@dataclass(frozen=True)
class Kind:
    """`package` is what it imports, `install` what pip calls that; `devices` are torch's types of them.

    `capability` is the least compute capability of a CUDA card, and `instead` the kind for a device that lacks it.
    """

    package: str = ""
    install: str = ""
    devices: tuple[str, ...] = EVERYWHERE
    capability: tuple[int, int] = (0, 0)
    instead: str = NONE


KINDS: Mapping[str, Kind] = {
    NONE: Kind(),
    AUTO: Kind("torchao", "torchao>=0.18"),
    "int8": Kind("torchao", "torchao>=0.18"),
    # The products themselves are computed in 8 bits, for which older cards have no circuits.
    "fp8": Kind("torchao", "torchao>=0.18", ("cuda",), (8, 9), "int8"),
    "nf4": Kind("bitsandbytes", "bitsandbytes>=0.46", ("cuda", "cpu"), instead="int8"),
    GGUF: Kind("gguf", "gguf>=0.17"),
}


def fault(kind: str, device: str = "auto", capability: tuple[int, int] | None = None) -> str:
    """Why `kind` can't be used, and what to do; "" if it can.

    `device` is a value of the key of that name, or a torch device; `capability` that of its card, where it is known.
    """
    needs, place = KINDS[kind], device.partition(":")[0]
    if needs.package and find_spec(needs.package) is None:
        return f"{KEY}: '{kind}' needs a package that is not here; install it: pip install '{needs.install}'"
    if place != "auto" and place not in needs.devices:
        return f"{KEY}: '{kind}' does not work on device '{device}'; set it to \"{needs.instead}\""
    if capability is not None and capability < needs.capability:
        wanted, has = (".".join(map(str, pair)) for pair in (needs.capability, capability))
        return f"{KEY}: '{kind}' needs compute capability {wanted}, this card has {has}; set it to \"{needs.instead}\""
    return ""


def is_gguf(model: Model) -> bool:
    """Whether the model's entry names a GGUF file, whose weights are quantised already."""
    files = [model.single_file] if isinstance(model.single_file, str) else model.single_file.values()
    return any(file.endswith(".gguf") for file in files)


def refusal(kind: str, model: Model) -> str:
    """Why `model` can't run with `kind`, and what to do; "" if it can."""
    if kind != GGUF or is_gguf(model):
        return ""
    return (
        f"{KEY}: 'gguf' is configured, and model '{model.id}' has no GGUF file; put one into models_dir, with an entry"
        f' there that says base = "{model.id}" and single_file = "NAME.gguf", or set the key to "int8"'
    )


def prepare_process(kind: str) -> None:
    """Before diffusers is imported: let it find no package of a kind that is not configured, and quiet torchao.

    Diffusers and peft import whatever of these is installed: torchao alone costs each start two seconds and 50 MB.
    """
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    unused = {other.package for other in KINDS.values()} - {"", "gguf", KINDS[kind].package}
    modules = cast("dict[str, object]", sys.modules)
    modules.update(dict.fromkeys(unused - modules.keys()))
