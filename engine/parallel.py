"""Context parallelism as the daemon sees it: which devices and kernels can work together on one task.

Here, so that what can't work stops the start and not the first task; `Model.context_parallel` tells which models can.
"""

from collections.abc import Sequence

from engine.attention import AUTO

KERNELS = (
    AUTO,
    "sdpa",
    "cudnn",
    "flash",
    "sage",
)  # of engine.attention; diffusers can't split the tokens for the others


def splits(heads: int, count: int) -> bool:
    """True if so many attention heads can be spread over `count` devices: the last one must have some, too."""
    each = -(-heads // count)
    return each * count - heads < each


def fault(devices: Sequence[str], attention_mode: str) -> str:
    """Why these devices can't compute a task together, and what to do; "" if they can."""
    kinds = sorted({device.partition(":")[0] for device in devices})
    if len(devices) < 2:
        return 'context_parallel: devices must name those that work together, as in devices = ["cuda:0", "cuda:1"]'
    if len(kinds) > 1:
        return f"context_parallel: devices must be of one kind, and are {' and '.join(kinds)}"
    if kinds == ["cuda"] and len(set(devices)) < len(devices):
        return "context_parallel: devices must name each card once"
    if attention_mode not in KERNELS:
        return f"context_parallel: attention_mode '{attention_mode}' does not work with it; choose {', '.join(KERNELS)}"
    return ""
