"""Context parallelism: each call of a denoiser is computed by several processes, each on its share of the tokens.

Diffusers splits and gathers them (Ulysses: for attention each process has all tokens of some heads), in the classes
that have a `_cp_plan`; each addition here says why it is needed.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import remove_context_parallel
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import _pytree as pytree

from engine.capabilities import heads_split
from engine.gpu.load import offloading
from engine.gpu.process import Rank

# With gloo beside it, the sizes of shares, which the processes exchange in each layer, need not wait for the card.
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}
TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
ROTATION = ContextParallelInput(split_dim=1, expected_dims=4, split_output=True)
# VACE is Wan with a second row of blocks. Each of those gets all tokens of the video again, and passes the tokens of
# the control on to the next.
PLANS: Mapping[str, Mapping[str, Any]] = {
    "WanVACETransformer3DModel": {
        "rope": {0: ROTATION, 1: ROTATION},
        "vace_blocks.*": {"hidden_states": TOKENS},
        "vace_blocks.0": {"control_hidden_states": TOKENS},
        "blocks.0": {"hidden_states": TOKENS},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
}


def plan_of(denoiser: Any) -> Mapping[str, Any] | None:
    """Where the tokens of a denoiser (or of a class of them) are split and gathered; None if it can't be shared."""
    cls: Any = denoiser if isinstance(denoiser, type) else type(denoiser)
    return PLANS.get(cls.__name__) or cls._cp_plan


def splits(pipe: Any, count: int) -> bool:
    """True if the heads of all denoisers can be spread over `count` devices."""
    parts: list[Any] = list(offloading.denoisers(pipe).values())
    return all(heads_split(part.config["num_attention_heads"], count) for part in parts)


@dataclass(frozen=True)
class Blank:
    """The place of a tensor among the arguments of a call; the tensor itself goes from device to device."""

    shape: torch.Size
    dtype: torch.dtype
    in_ram: bool  # where it was, and is to be again


def blanked(arguments: Any) -> Any:
    """`arguments` (nested lists and mappings) with a Blank for each tensor, so that they can be pickled."""
    return pytree.tree_map_only(
        torch.Tensor, lambda tensor: Blank(tensor.shape, tensor.dtype, tensor.device.type == "cpu"), arguments
    )


class Group:
    """The processes of a team, as this one of them sees it. They must all make the same calls in the same order."""

    def __init__(self, rank: Rank, device: torch.device) -> None:
        """Returns once all have joined."""
        self._rank, self._device = rank, device
        store = FileStore(str(rank.rendezvous), rank.count)
        dist.init_process_group(BACKENDS[device.type], store=store, rank=rank.number, world_size=rank.count)
        self._mesh = init_device_mesh(device.type, (1, rank.count), mesh_dim_names=("ring", "ulysses"))

    def leave(self) -> None:
        """Leave without the others, who may be dead already: `destroy_process_group` would wait for them."""
        dist.distributed_c10d._abort_process_group()

    @contextmanager
    def shared(self, pipe: Any) -> Iterator[None]:
        """Within the block this process computes its share of each call of the denoisers; all get the whole result.

        Enter it after whatever else hooks the blocks: those hooks must see the share.
        """
        with ExitStack() as shares:
            for denoiser in offloading.denoisers(pipe).values():
                self._share(denoiser)
                shares.callback(_unshare, denoiser)
            yield

    def _share(self, denoiser: Any) -> None:
        config = ContextParallelConfig(ulysses_degree=self._rank.count, ulysses_anything=True, mesh=self._mesh)
        # Without a card, this machine must seem to have one meanwhile: diffusers divides by their number.
        cards = patch.object(torch.accelerator, "device_count", return_value=1)
        with cards if self._device.type == "cpu" else nullcontext():
            denoiser.enable_parallelism(config=config, cp_plan=plan_of(denoiser))
        for module in denoiser.modules():
            registry = getattr(module, "_diffusers_hook", None)
            for hook in registry.hooks.values() if registry else ():
                if isinstance(hook, FBCHeadBlockHook):
                    hook._should_compute_remaining_blocks = partial(self._any, hook._should_compute_remaining_blocks)

    def _any(self, decide: Any, residual: torch.Tensor) -> bool:
        """What is decided for one of the shares holds for all, else they would wait for each other forever."""
        wanted = torch.tensor([decide(residual)], dtype=torch.uint8, device=self._device)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return bool(wanted.item())

    def send(self, arguments: Any) -> None:
        """Send the tensors among `arguments` to all others, who must call `receive` with `blanked(arguments)`."""
        pytree.tree_map_only(torch.Tensor, lambda tensor: _broadcast(tensor.to(self._device).contiguous()), arguments)

    def receive(self, blanks: Any) -> Any:
        """The arguments that the lead sends, with a tensor in the place of each blank."""
        return pytree.tree_map_only(Blank, self._received, blanks)

    def _received(self, blank: Blank) -> torch.Tensor:
        tensor = torch.empty(blank.shape, dtype=blank.dtype, device=self._device)
        _broadcast(tensor)
        return tensor.cpu() if blank.in_ram else tensor


def _broadcast(tensor: torch.Tensor) -> None:
    """Copy the lead's tensor into those of the others; all are contiguous."""
    if tensor.numel():
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)  # as bytes: not every backend knows every dtype


def _unshare(denoiser: Any) -> None:
    remove_context_parallel(denoiser, plan_of(denoiser))
    denoiser._parallel_config = None
    for module in denoiser.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = None
