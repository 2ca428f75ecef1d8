"""How a long video is cut into overlapping windows; `engine.gpu.run.sliding` makes the windows and joins them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from engine.catalog.models import FrameRule, Model
from engine.job import Job

SETTINGS = ("sliding_window_size", "sliding_window_overlap", "sliding_window_color_correction_strength")


class Window(NamedTuple):
    """`frames` frames from frame `start` of the whole video; the first `overlap` of them are known already."""

    start: int
    frames: int
    overlap: int


def windows(job: Job, rule: FrameRule) -> list[Window]:
    """The windows of a job, in order; the last may reach beyond the video's end by less than a step of `rule`."""
    if not job.window_frames:
        return [Window(0, job.frames, 0)]
    found: list[Window] = []
    known = done = job.window_overlap  # as if the first window began with known frames too
    # About equally long: a last one of a few frames would be unlike anything that the model was trained on.
    while (missing := job.frames - done) > 0:
        count = -(-missing // (job.window_frames - known))
        frames = rule.shortest_of(-(-missing // count) + known)
        found.append(Window(done - known, frames, known if found else 0))
        done += frames - known
    return found


def chosen(model: Model, task: str, values: Mapping[str, Any], warnings: list[str]) -> tuple[int, int]:
    """The most frames of a window and of its overlap; 0, 0: no windows. Changes get a sentence each in `warnings`."""
    continuation = model.continuation(task)
    size, overlap = values["sliding_window_size"], values["sliding_window_overlap"]
    if continuation is None and (size or overlap):
        warnings.append(f"sliding_window_size: model '{model.id}' has no such setting, the value was ignored")
    if continuation is None or size == 0:
        return 0, 0
    shared = min(overlap or continuation.overlap, continuation.most)
    if shared != (overlap or shared):
        warnings.append(f"sliding_window_overlap: {overlap} was changed to {shared}, the most for model '{model.id}'")
    wanted = size or int(model.defaults["video_length"])  # what the model was made for
    made = max(model.frames.nearest(wanted), model.frames.shortest_of(2 * shared))  # more than half of it is new
    if size and made != size:
        warnings.append(f"sliding_window_size: {size} was changed to {made}, the nearest for model '{model.id}'")
    return made, min(shared, made - 1)


def usual(model: Model) -> dict[str, int] | None:
    """Size and overlap of a window by default; None if the model makes every video at once."""
    size, overlap = chosen(model, model.tasks[0], {name: model.defaults.get(name) for name in SETTINGS}, [])
    return {"size": size, "overlap": overlap} if size else None
