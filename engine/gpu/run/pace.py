"""The pace of a video: how much changes from frame to frame, and how a jump is spread out."""

from itertools import pairwise

import torch

JUMP = 1.1  # times the usual change: a smaller step is not visible
ROUNDS = 4  # of evening: later ones change nothing visible


def changes(frames: torch.Tensor) -> torch.Tensor:
    """The mean change of a level from each frame to the next, (F - 1,) float32; frames: (F, H, W, 3) uint8."""
    # Pair by pair: all frames at once in float32 would take four times the memory of the window.
    return torch.stack([(after.float() - before.float()).abs().mean() for before, after in pairwise(frames)])


def evened(frames: torch.Tensor, usual: float) -> torch.Tensor:
    """`frames`, (F, H, W, 3) uint8, at an even pace if one of their changes is a jump against `usual`; else unchanged.

    The first and the last stay. Each other is a blend of the two around the time when its share of the whole change is
    reached, so that no change is larger than the mean of all was.
    """
    if changes(frames).max() <= JUMP * usual:
        return frames  # a blend is a little softer than a frame
    times, tries, made = torch.arange(float(len(frames))), [], frames
    for _ in range(ROUNDS):  # blends change less than the frames around them, so that one round is not quite even
        times = _evened(times, changes(made))
        before = times.long().clamp(max=len(frames) - 2)
        shares = (times - before).view(-1, 1, 1, 1)
        made = frames[before].float().lerp(frames[before + 1].float(), shares).round().to(torch.uint8)
        tries.append(made)
    return min(tries, key=lambda one: float(changes(one).max()))


def _evened(times: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """As many times as before, (F,) float32, moved so that all changes are equal; `steps` are the present changes."""
    done = torch.cat([torch.zeros(1), steps.cumsum(0)])
    wanted = torch.linspace(0, float(done[-1]), len(done))[1:-1]
    after = torch.searchsorted(done, wanted).clamp(min=1)
    shares = (wanted - done[after - 1]) / (done[after] - done[after - 1]).clamp(min=1e-9)  # nothing may change at all
    return torch.cat([times[:1], times[after - 1].lerp(times[after], shares), times[-1:]])
