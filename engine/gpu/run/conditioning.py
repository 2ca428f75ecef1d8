"""The input media of a job as arguments of a pipeline, in the form of its class (`start_image_as` in the catalogue)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from engine.catalog.abilities import FORMS, INPUTS
from engine.catalog.models import MASKED_FORMS, Pipeline
from engine.files import footage, media
from engine.job import Job

MID_GREY = (128, 128, 128)  # what a masked control video holds where a frame is to be generated
KEEP, GENERATE = 0, 255
LEAD = "lead"  # beside the inputs of a masked video: the frames that it begins with
Inputs = Mapping[str, Any]  # name → what was opened


@dataclass(frozen=True)
class Call:
    """One call of a pipeline: `job`, which makes a result for each of `seeds`.

    A window of a longer video begins with the frames of `lead`, each (H, W, 3) uint8, unless it is the first; frame
    `start` of the input videos belongs to its first frame.
    """

    job: Job
    seeds: Sequence[int]
    lead: Sequence[NDArray[np.uint8]] = ()
    start: int = 0


def roles(pipeline: Pipeline, call: Call, sample_rate: int) -> dict[str, Any]:
    """Role → value for every input, cropped to the frame, never stretched; sound at `sample_rate` samples a second."""
    job, opened = call.job, {}
    for name, paths in job.inputs.items():
        values = [_opened(path, name, call, sample_rate) for path in paths]
        opened[name] = values if INPUTS[name].several else values[0]
    if (count := pipeline.continues_from) and "video_source" in opened:
        # The end of the source video; it may be longer than what is made, and a short one begins with a held frame.
        frames = footage.read_last_frames(job.inputs["video_source"][0], job.fps, count)
        held = frames[:1] * (count - len(frames))
        opened["video_source"] = [_fitted(frame, "video_source", job) for frame in held + frames]
    if lead := [Image.fromarray(frame) for frame in call.lead]:
        if pipeline.start_image_as in MASKED_FORMS:
            opened[LEAD] = lead
        else:
            opened |= {"video_source": lead} if pipeline.continues_from else {"image_start": lead[0]}
    return _FORMS[pipeline.start_image_as](pipeline, job, opened)


def _opened(path: Path, name: str, call: Call, sample_rate: int) -> Any:
    job, about = call.job, INPUTS[name]
    if about.kind == "audio":
        return _sound(path, sample_rate)
    if about.kind == "video":
        return [_fitted(frame, name, job) for frame in footage.read_frames(path, job.fps, job.frames, call.start)]
    picture = media.open_image(path)
    return picture if about.several else _fitted(picture, name, job)


def _sound(path: Path, sample_rate: int) -> torch.Tensor:
    """The whole sound, (2, N) float32 in -1..1, at `sample_rate` samples a second. Raises BadFootage."""
    resampler = av.AudioResampler("fltp", "stereo", sample_rate)
    chunks: list[NDArray[Any]] = []
    left = footage.MAX_S * sample_rate  # a file can hold more than the length that it names, and fill the memory
    with path.open("rb") as file, footage.opened(file, "audio") as stream:
        frames = chain(stream.container.decode(stream), [None])  # None: what the resampler still holds
        for part in chain.from_iterable(map(resampler.resample, frames)):
            chunks.append(part.to_ndarray()[:, :left])
            left -= chunks[-1].shape[1]
            if not left:
                break
    return torch.from_numpy(np.concatenate(chunks, axis=1))


def _fitted(picture: Image.Image, name: str, job: Job) -> Image.Image:
    if INPUTS[name].role == "mask":  # a mask has no shades
        return ImageOps.fit(picture.convert("L"), (job.width, job.height), Image.Resampling.NEAREST)
    return ImageOps.fit(picture, (job.width, job.height), Image.Resampling.LANCZOS)


def _each(convert: Callable[[Any, Job], Any], pipeline: Pipeline, job: Job, opened: Inputs) -> dict[str, Any]:
    return {pipeline.role(name): convert(value, job) for name, value in opened.items()}


def _as_masked_video(pipeline: Pipeline, job: Job, opened: Inputs) -> dict[str, Any]:
    """A video that is grey where nothing is known, and a mask that is black where a frame stays as it is."""
    taken = FORMS[pipeline.start_image_as] | {LEAD}
    others = {pipeline.role(name): value for name, value in opened.items() if name not in taken}
    if len(others) == len(opened):
        return others
    size, places = (job.width, job.height), {"image_start": 0, "image_end": job.frames - 1}
    stills = {i: opened[name] for name, i in places.items() if name in opened} | dict(enumerate(opened.get(LEAD, ())))
    video = opened.get("video_guide") or opened.get("video_source") or [Image.new("RGB", size, MID_GREY)]
    masks = opened.get("video_mask") or [Image.new("L", size, GENERATE)]  # a guide is painted over everywhere
    keep = Image.new("L", size, KEEP)
    return {
        **others,
        "source_video": [stills.get(i) or video[min(i, len(video) - 1)] for i in range(job.frames)],
        "mask": [keep if i in stills else masks[min(i, len(masks) - 1)] for i in range(job.frames)],
    }


def _as_conditions(condition: Callable[[Any, int], Any], _: Pipeline, job: Job, opened: Inputs) -> dict[str, Any]:
    """Each picture, and a source video, with the index of its first frame, as the class of a condition."""
    places = {"image_start": 0, "video_source": 0, "image_end": job.frames - 1}
    made = [condition(opened[name], frame) for name, frame in places.items() if name in opened]
    return {"conditions": made} if made else {}


def _condition(value: Any, frame: int) -> Any:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition  # heavy, and few jobs need it

    return LTXVideoCondition(**{"video" if isinstance(value, list) else "image": value}, frame_index=frame)


def _condition_2(value: Any, frame: int) -> Any:
    """LTX-2's, which counts latent frames: -1 is the last."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition  # heavy, and few jobs need it

    return LTX2VideoCondition(frames=value, index=-1 if frame else 0)


def _as_masked_tensors(pipeline: Pipeline, job: Job, opened: Inputs) -> dict[str, Any]:
    """A masked video in one tensor, with a mask of 0 and 255: if that is 255 everywhere the class ignores the video."""
    masked = _as_masked_video(pipeline, job, opened)
    video, mask = (_stacked(masked[role], job) for role in ("source_video", "mask"))
    return {**masked, "source_video": video, "mask": 255 * mask}


def _stacked(pictures: Image.Image | list[Image.Image], job: Job) -> torch.Tensor:
    """Pictures → (1, C, F, H, W) float32 in 0..1, cropped to the frame."""
    size, frames = (job.width, job.height), pictures if isinstance(pictures, list) else [pictures]
    arrays = [np.asarray(ImageOps.fit(frame, size, Image.Resampling.LANCZOS)) for frame in frames]
    video = torch.from_numpy(np.stack(arrays)).reshape(len(arrays), job.height, job.width, -1)
    return video.permute(3, 0, 1, 2)[None] / 255


_FORMS: Mapping[str, Callable[[Pipeline, Job, Inputs], dict[str, Any]]] = {
    "image": partial(_each, lambda value, _: value),
    "sound_batch": partial(_each, lambda sound, _: sound[None]),  # (1, 2, N)
    "video_and_mask": _as_masked_video,
    "conditions": partial(_as_conditions, _condition),
    "conditions_2": partial(_as_conditions, _condition_2),
    "frame_tensors": partial(_each, lambda pictures, job: _stacked(pictures, job).transpose(1, 2)),  # (1, F, C, H, W)
    "rgba": partial(_each, lambda picture, _: picture.convert("RGBA")),
    "masked_tensors": _as_masked_tensors,
}
