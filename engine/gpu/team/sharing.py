"""Context parallelism: each call of a denoiser is computed by several processes, each on its share of the tokens.

Diffusers splits the tokens and gathers them (Ulysses: for attention each process has all tokens of some heads). Which
classes it can split stands in their `_cp_plan`; what is added here says why.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import remove_context_parallel
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh

from engine.capabilities import heads_split
from engine.gpu.load import offloading
from engine.gpu.process import Rank
from engine.gpu.team.parcels import Parcel, numbers

# With gloo beside it, the sizes of shares, which each layer tells the others, need not wait for the card.
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}
TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
ROTATION = ContextParallelInput(split_dim=1, expected_dims=4, split_output=True)
# VACE is Wan with a second row of blocks. Each of those is given all tokens of the video anew, and hands the tokens of
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
    """Where the tokens of a denoiser (or of a class of them) are split and gathered; None if nobody knows."""
    cls: Any = denoiser if isinstance(denoiser, type) else type(denoiser)
    plan: Mapping[str, Any] | None = PLANS.get(cls.__name__) or cls._cp_plan
    return plan


def splits(pipe: Any, count: int) -> bool:
    """True if the heads of all denoisers can be spread over `count` devices."""
    parts: list[Any] = list(offloading.denoisers(pipe).values())
    return all(heads_split(part.config["num_attention_heads"], count) for part in parts)


class Group:
    """The processes of a team, as this one of them sees it. They must all make the same calls in the same order."""

    def __init__(self, rank: Rank, device: torch.device) -> None:
        """Returns once all are there."""
        self._rank, self._device = rank, device
        store = FileStore(str(rank.rendezvous), rank.count)
        dist.init_process_group(BACKENDS[device.type], store=store, rank=rank.number, world_size=rank.count)
        self._mesh = init_device_mesh(device.type, (1, rank.count), mesh_dim_names=("ring", "ulysses"))

    def leave(self) -> None:
        """Without the others, who may be dead already. (`destroy_process_group` would wait for them.)"""
        dist.distributed_c10d._abort_process_group()

    @contextmanager
    def shared(self, pipe: Any) -> Iterator[None]:
        """Within the block this process computes its share of each call of the denoisers; all get the whole result.

        To be entered after whatever else hooks the blocks: those hooks are to see the share.
        """
        with ExitStack() as shares:
            for denoiser in offloading.denoisers(pipe).values():
                self._share(denoiser)
                shares.callback(_unshare, denoiser)
            yield

    def _share(self, denoiser: Any) -> None:
        config = ContextParallelConfig(ulysses_degree=self._rank.count, ulysses_anything=True, mesh=self._mesh)
        with _a_card() if self._device.type == "cpu" else nullcontext():
            denoiser.enable_parallelism(config=config, cp_plan=plan_of(denoiser))
        for module in denoiser.modules():
            registry = getattr(module, "_diffusers_hook", None)
            for hook in registry.hooks.values() if registry else ():
                if isinstance(hook, FBCHeadBlockHook):
                    hook._should_compute_remaining_blocks = partial(self._any, hook._should_compute_remaining_blocks)

    def _any(self, decide: Any, residual: torch.Tensor) -> bool:
        """What is decided for one of the shares holds for all, else they would wait for each other for ever."""
        wanted = torch.tensor([decide(residual)], dtype=torch.uint8, device=self._device)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return bool(wanted.item())

    def send(self, tensors: list[torch.Tensor]) -> None:
        """Hand the tensors of a parcel to all others, who must call `receive`."""
        for tensor in tensors:
            if tensor.numel():
                dist.broadcast(numbers(tensor, self._device), src=0)

    def receive(self, parcel: Parcel) -> Any:
        """What the lead packed."""
        return parcel.unpacked([blank.filled(self._received(blank.size_bytes)) for blank in parcel.blanks])

    def _received(self, size_bytes: int) -> torch.Tensor:
        """(size_bytes,) uint8"""
        found = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        if size_bytes:
            dist.broadcast(found, src=0)
        return found


@contextmanager
def _a_card() -> Iterator[None]:
    """Within, this machine seems to have one: diffusers divides by their number."""
    counted = torch.accelerator.device_count
    setattr(torch.accelerator, "device_count", lambda: 1)  # noqa: B010  # mypy lets no function be replaced
    try:
        yield
    finally:
        setattr(torch.accelerator, "device_count", counted)  # noqa: B010


def _unshare(denoiser: Any) -> None:
    remove_context_parallel(denoiser, plan_of(denoiser))
    denoiser._parallel_config = None
    for module in denoiser.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = None
