"""Random weights that pass every input on: library initialisations start near zero, and then no prompt shows."""

from math import sqrt
from typing import Any, TypeVar

import torch
from torch import nn

Part = TypeVar("Part", bound=nn.Module)

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)


def lively(part: Part, gain: float = 1.0, /, **gains: float) -> Part:
    """`part`, ready to run, with layers whose outputs are about `gain` times as large as their inputs.

    `gains` multiply further the weights of the layers whose name ends so (with `__` for a dot).
    """
    with torch.no_grad():
        for name, layer in part.named_modules():
            _draw(layer, gain)
            for ending, factor in gains.items():
                if name.endswith(ending.replace("__", ".")):
                    layer.get_parameter("weight").mul_(factor)
    return part.eval()


def _draw(layer: Any, gain: float) -> None:
    if isinstance(layer, nn.Embedding):
        nn.init.normal_(layer.weight)
    elif isinstance(layer, LAYERS):
        inputs = layer.in_channels if isinstance(layer, nn.ConvTranspose1d) else layer.weight[0].numel()
        nn.init.normal_(layer.weight, std=gain / sqrt(inputs))
