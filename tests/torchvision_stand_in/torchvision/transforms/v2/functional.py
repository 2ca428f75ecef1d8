"""The functions of the first version: for what is used of them, both are the same."""

from ..functional import (
    InterpolationMode,
    crop,
    grayscale_to_rgb,
    normalize,
    pad,
    pil_to_tensor,
    resize,
    to_dtype,
    to_tensor,
)

__all__ = [
    "InterpolationMode",
    "crop",
    "grayscale_to_rgb",
    "normalize",
    "pad",
    "pil_to_tensor",
    "resize",
    "to_dtype",
    "to_tensor",
]
