"""Long videos: the windows of engine.planning.windows, each continuing the one before, joined without a seam."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, zip_longest

import numpy as np
import torch
from PIL import Image

from engine.catalog.abilities import TASKS
from engine.catalog.models import MASKED_FORMS, Model
from engine.gpu.run.conditioning import Call
from engine.job import SEED_RANGE, Job
from engine.planning.windows import Window, windows

SEED_STRIDE = 2**32  # from window to window; the seeds of a job's files count up by one
JUMP = 1.1  # times the usual change from frame to frame: a smaller one is not visible
ROUNDS = 4  # of evening: later ones change nothing visible
MOST_GAIN = 1.25  # of a correction: frames whose contrast differs by more show different things


def video(model: Model, job: Job, seed: int, make: Callable[[Call], torch.Tensor]) -> Iterator[torch.Tensor]:
    """The frames of one video in pieces, (F, H, W, 3) uint8, as they are ready; at most two windows are in memory.

    `make` makes the frames of one call. Each window begins with the last frames of the one before: the call is
    conditioned on them, and what it makes takes over their colours and fades in over them at an even pace.
    """
    pieces = windows(job, model.frames)
    end = torch.empty(0)  # of the window before: the last frame that was yielded, and those of the overlap
    for number, (window, following) in enumerate(zip_longest(pieces, pieces[1:])):
        made = make(_call(model, job, window, end[1:], seed + number * SEED_STRIDE, last=following is None))
        if window.overlap:
            made = joined(end, recoloured(made, end[1:], job.color_correction))
        made = made[: job.frames - window.start]
        done = len(made) - (following.overlap if following else 0)
        yield made[:done]
        end = made[done - 1 :]


def _call(model: Model, job: Job, window: Window, lead: torch.Tensor, seed: int, *, last: bool) -> Call:
    unused = set() if last else {"image_end"}
    task = _task(model, job, frozenset(job.inputs.keys() - unused), first=not window.overlap)
    if window.overlap:  # `lead` takes their place
        masked = model.pipelines[task].start_image_as in MASKED_FORMS
        unused |= {"image_start"} if masked else {"image_start", "video_source"}
    names = model.inputs_of(task) - unused
    inputs = {name: paths for name, paths in job.inputs.items() if name in names}
    part = replace(job, task=task, frames=window.frames, inputs=inputs, window_frames=0)
    return Call(part, [seed % SEED_RANGE], list(lead.numpy()), window.start)


def _task(model: Model, job: Job, given: frozenset[str], *, first: bool) -> str:
    """The task of a window. Without its end picture, what began as flf2v is i2v until the last window."""
    continuation = model.continuation(job.task)
    assert continuation
    if first:
        return job.task if TASKS[job.task].fits(given) else "i2v"
    ends = "image_end" in given
    return job.task if ends and "image_end" not in model.inputs_of(continuation.task) else continuation.task


def recoloured(made: torch.Tensor, known: torch.Tensor, strength: float) -> torch.Tensor:
    """`made` with the colours of `known`, which are its first frames as they should be; both (F, H, W, 3) uint8."""
    if not strength:
        return made
    # Encoding a frame again and again shifts the mean and the contrast of each channel a little every time.
    seen, wanted = (frames.float().reshape(-1, 3) for frames in (made[: len(known)], known))
    gain = (wanted.std(0) / seen.std(0).clamp(min=1e-6)).clamp(1 / MOST_GAIN, MOST_GAIN)
    levels = torch.arange(256.0).view(-1, 1)
    matched = (levels - seen.mean(0)) * gain + wanted.mean(0)  # (256, 3): each level of a channel, as it should be
    table = levels.lerp(matched, strength).round().clamp(0, 255).int().T.flatten().tolist()
    return torch.from_numpy(np.stack([np.asarray(Image.fromarray(frame).point(table)) for frame in made.numpy()]))


def joined(end: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """`made`, faded in over all frames of `end` but the first, which is the one before them, without a jump.

    Its objects may be behind or ahead of where the window before has left them: the difference is spread over the
    overlap and the changes into it and out of it.
    """
    count = len(end)
    whole = torch.cat([end[:1], faded(end[1:], made)])
    seam = evened(whole[: count + 1], usual=float(changes(made).mean()))
    return torch.cat([seam[1:], whole[count + 1 :]])


def faded(known: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """`made`, its first frames blended with `known`: mostly `known` at first, mostly `made` at the overlap's end."""
    count = len(known)
    weights = (torch.arange(1, count + 1) / (count + 1)).view(-1, 1, 1, 1)
    blended = known.float().lerp(made[:count].float(), weights).round().to(torch.uint8)
    return torch.cat([blended, made[count:]])


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
