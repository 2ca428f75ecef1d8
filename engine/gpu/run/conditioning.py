"""The input media of a job as arguments of a pipeline: pictures, lists of frames, masks, waveforms.

The form of a class (`start_image_as` in the catalogue) is how it takes start picture, end picture and source video;
every other input has a parameter of its own.
"""

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
    """Role → value for every input; what fills the frame is cropped to it and never stretched.

    Sound comes at `sample_rate` samples a second.
    """
    job, opened = call.job, {}
    for name, paths in job.inputs.items():
        values = [_opened(path, name, call, sample_rate) for path in paths]
        opened[name] = values if INPUTS[name].several else values[0]
    if pipeline.continues_from and "video_source" in opened:
        opened["video_source"] = _last_frames(job, pipeline.continues_from)
    return _FORMS[pipeline.start_image_as](pipeline, job, opened | _led(pipeline, call))


def _led(pipeline: Pipeline, call: Call) -> dict[str, Any]:
    """The frames that a window begins with, as the input that carries them."""
    lead = [Image.fromarray(frame) for frame in call.lead]
    if not lead:
        return {}
    if pipeline.start_image_as in MASKED_FORMS:
        return {LEAD: lead}
    return {"video_source": lead} if pipeline.continues_from else {"image_start": lead[0]}


def _opened(path: Path, name: str, call: Call, sample_rate: int) -> Any:
    kind, job = INPUTS[name].kind, call.job
    if kind == "audio":
        return _sound(path, sample_rate)
    if kind == "video":
        return [_fitted(frame, name, job) for frame in footage.read_frames(path, job.fps, job.frames, call.start)]
    picture = media.open_image(path)
    return picture if INPUTS[name].several else _fitted(picture, name, job)


def _last_frames(job: Job, count: int) -> list[Image.Image]:
    """The end of the source video; it may be longer than what is made, and a short one begins with a held frame."""
    frames = footage.read_last_frames(job.inputs["video_source"][0], job.fps, count)
    return [_fitted(frame, "video_source", job) for frame in frames[:1] * (count - len(frames)) + frames]


def _sound(path: Path, sample_rate: int) -> torch.Tensor:
    """The whole sound, (2, N) float32 in -1..1, at `sample_rate` samples a second. Raises BadFootage."""
    resampler = av.AudioResampler("fltp", "stereo", sample_rate)
    with path.open("rb") as file, footage.opened(file, "audio") as container:
        frames = chain(container.decode(container.streams.audio[0]), [None])  # None: what the resampler still holds
        chunks = [part.to_ndarray() for frame in frames for part in resampler.resample(frame)]
    return torch.from_numpy(np.concatenate(chunks, axis=1))


def _fitted(picture: Image.Image, name: str, job: Job) -> Image.Image:
    if INPUTS[name].role == "mask":  # a mask has no shades
        return ImageOps.fit(picture.convert("L"), (job.width, job.height), Image.Resampling.NEAREST)
    return ImageOps.fit(picture, (job.width, job.height), Image.Resampling.LANCZOS)


def _each(
    convert: Callable[[Any, Job], Any], pipeline: Pipeline, job: Job, opened: Mapping[str, Any]
) -> dict[str, Any]:
    """Every input by itself, under its role."""
    return {pipeline.role(name): convert(value, job) for name, value in opened.items()}


def _as_masked_video(pipeline: Pipeline, job: Job, opened: Mapping[str, Any]) -> dict[str, Any]:
    """A video that is grey where nothing is known, and a mask that is black where a frame stays as it is.

    A video without a mask guides the new one and is painted over everywhere.
    """
    taken = FORMS[pipeline.start_image_as] | {LEAD}
    others = {pipeline.role(name): value for name, value in opened.items() if name not in taken}
    if len(others) == len(opened):
        return others
    size, places = (job.width, job.height), {"image_start": 0, "image_end": job.frames - 1}
    stills = {i: opened[name] for name, i in places.items() if name in opened} | dict(enumerate(opened.get(LEAD, ())))
    video = opened.get("video_guide") or opened.get("video_source") or [Image.new("RGB", size, MID_GREY)]
    masks = opened.get("video_mask") or [Image.new("L", size, GENERATE)]
    keep = Image.new("L", size, KEEP)
    return {
        **others,
        "source_video": [stills.get(i) or _at(video, i) for i in range(job.frames)],
        "mask": [keep if i in stills else _at(masks, i) for i in range(job.frames)],
    }


def _at(frames: list[Image.Image], i: int) -> Image.Image:
    return frames[min(i, len(frames) - 1)]


def _as_conditions(_: Pipeline, job: Job, opened: Mapping[str, Any]) -> dict[str, Any]:
    """Each picture, and a source video, with the index of its first frame, as LTX-Video's own class."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition  # heavy, and few jobs need it

    def condition(value: Any, frame: int) -> LTXVideoCondition:
        return LTXVideoCondition(**{"video" if isinstance(value, list) else "image": value}, frame_index=frame)

    return _conditions(job, opened, condition)


def _as_conditions_2(_: Pipeline, job: Job, opened: Mapping[str, Any]) -> dict[str, Any]:
    """The same for LTX-2, which counts latent frames: -1 is the last."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition  # heavy, and few jobs need it

    return _conditions(job, opened, lambda value, frame: LTX2VideoCondition(frames=value, index=-1 if frame else 0))


def _conditions(job: Job, opened: Mapping[str, Any], condition: Callable[[Any, int], Any]) -> dict[str, Any]:
    places = {"image_start": 0, "video_source": 0, "image_end": job.frames - 1}
    made = [condition(opened[name], frame) for name, frame in places.items() if name in opened]
    return {"conditions": made} if made else {}


def _as_masked_tensors(pipeline: Pipeline, job: Job, opened: Mapping[str, Any]) -> dict[str, Any]:
    """A masked video in one tensor, with a mask of 0 and 255: if that is 255 everywhere the class ignores the video."""
    masked = _as_masked_video(pipeline, job, opened)
    video, mask = (_stacked(masked[role], job) for role in ("source_video", "mask"))
    return {**masked, "source_video": video, "mask": 255 * mask}


def _stacked(pictures: Image.Image | list[Image.Image], job: Job) -> torch.Tensor:
    """Pictures → (1, C, F, H, W) float32 in 0..1, cropped to the frame."""
    frames = pictures if isinstance(pictures, list) else [pictures]
    fitted = (ImageOps.fit(frame, (job.width, job.height), Image.Resampling.LANCZOS) for frame in frames)
    arrays = [np.asarray(frame) for frame in fitted]
    video = torch.from_numpy(np.stack(arrays)).reshape(len(arrays), job.height, job.width, -1)
    return video.permute(3, 0, 1, 2)[None] / 255


_FORMS: Mapping[str, Callable[[Pipeline, Job, Mapping[str, Any]], dict[str, Any]]] = {
    "image": partial(_each, lambda value, _: value),
    "sound_batch": partial(_each, lambda sound, _: sound[None]),  # (1, 2, N)
    "video_and_mask": _as_masked_video,
    "conditions": _as_conditions,
    "conditions_2": _as_conditions_2,
    "frame_tensors": partial(_each, lambda pictures, job: _stacked(pictures, job).transpose(1, 2)),  # (1, F, C, H, W)
    "rgba": partial(_each, lambda picture, _: picture.convert("RGBA")),
    "masked_tensors": _as_masked_tensors,
}
