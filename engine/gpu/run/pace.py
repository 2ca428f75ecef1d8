"""The pace of a video: how much changes from frame to frame, and how a jump in it is spread out."""

from itertools import pairwise

import torch

JUMP = 1.1  # times the usual change: a step below it is not seen as one
ROUNDS = 4  # of evening: later ones change nothing that can be seen


def changes(frames: torch.Tensor) -> torch.Tensor:
    """The mean change of a level from each frame to the next, (F - 1,) float32; frames: (F, H, W, 3) uint8."""
    # Pair by pair: all frames at once in float32 would take four times the memory of the window.
    return torch.stack([(after.float() - before.float()).abs().mean() for before, after in pairwise(frames)])


def evened(frames: torch.Tensor, usual: float) -> torch.Tensor:
    """`frames`, (F, H, W, 3) uint8, at an even pace if one of their changes is a jump against `usual`; else unchanged.

    The first and the last stay. Each one between is moved in time to where its share of all the change is done, and is
    a blend of the two frames around that place: so no change is larger than the mean of them all was.
    """
    if changes(frames).max() <= JUMP * usual:
        return frames  # a blend is a little softer than a frame
    places, tries, made = torch.arange(float(len(frames))), [], frames
    for _ in range(ROUNDS):  # a step around a corner is shorter than its way, so that the first round is not quite even
        places = _evened(places, changes(made))
        made = _at(frames, places)
        tries.append(made)
    return min(tries, key=lambda one: float(changes(one).max()))


def _evened(places: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """As many places in time as before, (F,) float32, between which as much is done each; `steps` is what was."""
    done = torch.cat([torch.zeros(1), steps.cumsum(0)])
    wanted = torch.linspace(0, float(done[-1]), len(done))[1:-1]
    after = torch.searchsorted(done, wanted).clamp(min=1)
    shares = (wanted - done[after - 1]) / (done[after] - done[after - 1]).clamp(min=1e-9)  # nothing may be done at all
    return torch.cat([places[:1], places[after - 1].lerp(places[after], shares), places[-1:]])


def _at(frames: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What is to be seen at each place in time: a blend of the two frames around it."""
    before = places.long().clamp(max=len(frames) - 2)
    shares = (places - before).view(-1, 1, 1, 1)
    return frames[before].float().lerp(frames[before + 1].float(), shares).round().to(torch.uint8)
