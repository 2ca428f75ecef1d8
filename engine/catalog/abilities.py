"""The inputs of a request, and the tasks of a model with the inputs that each needs.

An input is a picture, a video or a sound; a task is the catalogue's word for what a model does with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Input:
    """A request field that holds media. `role` is what the pipeline uses it for, by the catalogue's name."""

    kind: str  # image, video, audio
    role: str
    about: str
    several: bool = False


INPUTS: Mapping[str, Input] = {
    "image_start": Input("image", "start_image", "First frame of the video, or the picture to change."),
    "image_end": Input("image", "end_image", "Last frame of the video."),
    "image_refs": Input("image", "reference_images", "Pictures of what the result should show.", several=True),
    "image_guide": Input("image", "control_image", "Depth map, edges or pose that the picture follows."),
    "image_mask": Input("image", "mask", "White where image_start is repainted, black where it is kept."),
    "video_source": Input("video", "source_video", "The video to change or to continue."),
    "video_guide": Input("video", "control_video", "Depth, edges or pose that the video follows, frame by frame."),
    "video_mask": Input("video", "mask", "White where the video is replaced, black where it is kept."),
    "video_face": Input("video", "face_video", "The face whose expressions the animated figure follows."),
    "audio_source": Input("audio", "source_audio", "The sound to change."),
    "audio_reference": Input("audio", "reference_audio", "A sound whose timbre and style are adopted."),
}


@dataclass(frozen=True)
class Ability:
    """What a task accepts: one of the sets of inputs in `needs`, and with it any of the inputs in `may`."""

    needs: tuple[frozenset[str], ...]
    may: frozenset[str] = frozenset()

    def fits(self, given: frozenset[str]) -> bool:
        """True if `given` is enough and not too much."""
        return any(needed <= given <= needed | self.may for needed in self.needs)

    @property
    def inputs(self) -> frozenset[str]:
        """All inputs that it accepts."""
        return self.may.union(*self.needs)


def _task(*needs: str, may: str = "") -> Ability:
    return Ability(tuple(frozenset(words.split()) for words in needs), frozenset(may.split()))


# In order of preference: of a model's tasks that fit the inputs, the first is chosen.
TASKS: Mapping[str, Ability] = {
    "t2v": _task(""),
    "t2i": _task(""),
    "t2a": _task("", may="audio_reference"),
    "flf2v": _task("image_start image_end"),
    "i2v": _task("image_start", may="image_end"),
    "inpaint": _task("image_start image_mask"),
    "i2i": _task("image_start", "image_refs", may="image_refs"),
    "animate": _task("image_start video_guide video_face"),
    "replace": _task("image_start video_guide video_face video_source video_mask"),
    "control": _task("video_guide", "image_guide", may="image_start image_refs video_mask"),
    "v2v": _task("video_source", may="video_mask image_refs image_start image_end"),
    "a2a": _task("audio_source", may="audio_reference"),
    "vace": _task("", may="image_start image_end image_refs video_guide video_mask"),
}

# Step caches under the names of a request: what the catalogue's `caches` calls them.
STEP_CACHES: Mapping[str, str] = {"mag": "mag", "tea": "tea", "fbc": "first_block", "taylorseer": "taylorseer"}
