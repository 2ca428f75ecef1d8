"""TeaCache: the blocks of a denoiser are skipped at steps where the time embedding has hardly changed, and what they
added at the last computed step is added again. After arXiv:2411.19108; diffusers 0.42.1 has no such cache, only hooks.

The time embedding depends on the timestep alone, so the steps to compute are known before the run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

NAME = "wangpd_teacache"


class State(BaseState):  # type: ignore[misc]  # diffusers has no types
    """What one pass of guidance remembers from step to step."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, *_: Any, **__: Any) -> None:
        """As before a run."""
        self.step, self.compute = 0, True
        self.input: Tensor | None = None
        self.residual: Tensor | None = None


class BlockHook(ModelHook):  # type: ignore[misc]  # diffusers has no types
    """Runs a block, or passes its input on. The first block of a denoiser decides, the last one keeps the residual."""

    _is_stateful = True

    def __init__(self, states: StateManager, schedule: Sequence[bool], first: bool, last: bool) -> None:
        super().__init__()
        self.states, self._schedule, self._first, self._last = states, schedule, first, last

    def new_forward(self, _: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Replaces the block's own forward; returns the shape of `hidden_states`."""
        state: State = self.states.get_state()
        if self._first:
            state.input = hidden_states
            state.compute = state.residual is None or self._schedule[state.step % len(self._schedule)]
        output: Tensor = hidden_states
        if state.compute:
            output = self.fn_ref.original_forward(hidden_states, *args, **kwargs)
        return self._ended(state, output) if self._last else output

    def _ended(self, state: State, output: Tensor) -> Tensor:
        assert state.input is not None
        state.step += 1
        if state.compute:
            state.residual = output - state.input
        assert state.residual is not None
        return output if state.compute else output + state.residual

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Reset the states; diffusers calls it when a run has ended."""
        self.states.reset()
        return module


def enable(denoiser: Any, schedule: Sequence[bool]) -> None:
    """Let `denoiser` compute only the steps that are True in `schedule`; each pass of guidance counts its own steps."""
    states = StateManager(State)
    for number, block in enumerate(denoiser.blocks):
        hook = BlockHook(states, schedule, number == 0, number == len(denoiser.blocks) - 1)
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, NAME)
    HookRegistry.check_if_exists_or_initialize(denoiser).invalidate_child_registries_cache()


def disable(denoiser: Any) -> None:
    """Remove the hooks."""
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.remove_hook(NAME, recurse=True)
    registry.invalidate_child_registries_cache()


@torch.no_grad()
def embedding_changes(denoiser: Any, timesteps: Tensor) -> list[float]:
    """The relative L1 change of the time embedding from each timestep to the next."""
    embedder = denoiser.condition_embedder
    dtype = next(embedder.time_embedder.parameters()).dtype
    embedded = embedder.time_embedder(embedder.timesteps_proj(timesteps.float()).to(dtype)).float()  # (steps, D)
    changes = (embedded.diff(dim=0).abs().mean(1) / embedded[:-1].abs().mean(1)).tolist()
    return [float(change) for change in changes]
