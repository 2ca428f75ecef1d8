"""Muon: momentum whose update is orthogonalised, for the matrices of the transformer blocks.

Written for small CPU matrices: those of one shape are stacked and handled in one batched call, in float32
(the version in torch works in bfloat16, which this kind of CPU emulates).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, rows, columns) → the nearest matrices with singular values about one, by Newton-Schulz iterations."""
    a, b, c = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """An update has singular values of about `lr`, whatever the size of the gradient."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002 torch's signature
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for stack in _by_shape(group["params"]):
                self._step_stack(stack, group["lr"], group["momentum"])

    def _step_stack(self, stack: list[nn.Parameter], lr: float, momentum: float) -> None:
        grads = torch.stack([param.grad for param in stack])
        memory = torch.stack([self.state[param].setdefault("momentum", torch.zeros_like(param)) for param in stack])
        memory.lerp_(grads, 1 - momentum)
        rows, columns = stack[0].shape
        updates = orthogonalize(grads.lerp(memory, momentum)) * max(1, rows / columns) ** 0.5
        for param, update, moment in zip(stack, updates, memory, strict=True):
            self.state[param]["momentum"] = moment.clone()
            param.sub_(update, alpha=lr)


def _by_shape(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    stacks = defaultdict(list)
    for param in params:
        if param.grad is not None:
            stacks[param.shape].append(param)
    return list(stacks.values())
