"""The denoisers' repeated blocks, compiled by TorchInductor at their first call; all blocks of a kind share the result.

Only a block's own forward is compiled, so that step caches and offloading can hook blocks from outside. Where something
inside a block is hooked, or a LoRA is there, the blocks run uncompiled for that task.
"""

import logging
from collections.abc import Callable
from functools import cached_property, update_wrapper
from typing import Any

import torch
from torch import nn

from engine.gpu.load import offloading
from engine.job import Job

log = logging.getLogger("wangpd.worker")
BLOCKS = "_wangpd_blocks"  # where a denoiser keeps them


class Block:
    """The forward of one block: compiled, or as it is while `plain`."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.plain = module, False
        self._forward: Callable[..., Any] = module.forward
        update_wrapper(self, module.forward)  # caches read the names of its arguments

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return (self._forward if self.plain else self._compiled)(*arguments, **named)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self._forward)  # not before it is needed: this imports the compiler


def compile_blocks(pipe: Any) -> int:
    """Let the repeated blocks, which nothing hooks yet, be compiled at their first call; returns how many there are."""
    # Each new shape and kind of call of a block counts. Beyond torch's own 8, it would run uncompiled from then on.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.suppress_errors = True  # what can't be compiled runs as it is, and the log says so
    count = 0
    for denoiser in offloading.denoisers(pipe).values():
        kinds = getattr(denoiser, "_repeated_blocks", None) or ()
        blocks = [Block(module) for module in denoiser.modules() if type(module).__name__ in kinds]
        for block in blocks:
            block.module.forward = block
        setattr(denoiser, BLOCKS, blocks)
        count += len(blocks)
    return count


def suit(pipe: Any, job: Job) -> None:
    """Let the compiled blocks run as they are where this job needs it. To be called when its hooks are in place."""
    blocks = [block for denoiser in offloading.denoisers(pipe).values() for block in getattr(denoiser, BLOCKS, ())]
    # Compiled code would not see what diffusers hooks inside a block.
    registries = (vars(part).get("_diffusers_hook") for block in blocks for part in list(block.module.modules())[1:])
    inside = any(registry.hooks for registry in registries if registry)
    for block in blocks:
        block.plain = bool(job.loras) or inside
    if blocks and blocks[0].plain:
        log.debug("compile: not for this task, with %s", "layers hooked one by one" if inside else "LoRAs")
