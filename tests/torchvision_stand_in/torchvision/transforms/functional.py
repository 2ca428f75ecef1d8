"""Pictures as tensors (…, C, H, W): resize, pad, crop, normalise, convert."""

from collections.abc import Sequence
from enum import Enum

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.functional import pad as pad_tensor


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


SMOOTH = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC, InterpolationMode.LANCZOS)
BYTE = 255


def resize(
    image: Tensor,
    size: Sequence[int],
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    antialias: bool | None = True,
) -> Tensor:
    """`image` in `size` (height, width), of the same dtype. Raises ValueError for another length of `size`."""
    height, width = size
    flat = image.reshape(-1, *image.shape[-3:])  # (N, C, H, W): what interpolate takes
    smooth = interpolation in SMOOTH
    resized = interpolate(
        flat if image.is_floating_point() else flat.float(),
        (height, width),
        mode=interpolation.value,
        antialias=bool(antialias) and smooth,
    )
    if not image.is_floating_point():  # the smooth modes overshoot
        resized = resized.round().clamp(0, torch.iinfo(image.dtype).max)
    return resized.to(image.dtype).reshape(*image.shape[:-2], height, width)


def pad(image: Tensor, padding: Sequence[int], fill: float | None = 0, padding_mode: str = "constant") -> Tensor:
    """`image` with `padding` (left, top, right, bottom) pixels of `fill` around it."""
    left, top, right, bottom = padding
    return pad_tensor(image, (left, right, top, bottom), mode=padding_mode, value=fill)


def crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """The part of `image` (height, width) that begins at (top, left); it lies within."""
    return image[..., top : top + height, left : left + width]


def normalize(
    image: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, inplace: bool = False
) -> Tensor:
    """(image - mean) / std, with one mean and one std a channel; `inplace` changes `image` itself."""
    target = image if inplace else image.clone()
    means, stds = (torch.as_tensor(value, dtype=image.dtype, device=image.device) for value in (mean, std))
    return target.sub_(means.view(-1, 1, 1)).div_(stds.view(-1, 1, 1))


def grayscale_to_rgb(image: Tensor) -> Tensor:
    """A grey image (…, 1, H, W) in three equal channels; any other as it is."""
    return image.expand(*image.shape[:-3], 3, -1, -1) if image.shape[-3] == 1 else image


def to_dtype(image: Tensor, dtype: torch.dtype, scale: bool = False) -> Tensor:
    """`image` as uint8 or float; with `scale`, 0..255 of the one is 0..1 of the other."""
    if not scale or image.is_floating_point() == dtype.is_floating_point:
        return image.to(dtype)
    return image.to(dtype) / BYTE if dtype.is_floating_point else (image * BYTE).round().to(dtype)


def pil_to_tensor(picture: Image.Image) -> Tensor:
    """A picture as (C, H, W) uint8."""
    pixels = torch.from_numpy(np.array(picture))
    return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)).contiguous()


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture as (C, H, W) float32 in 0..1."""
    return pil_to_tensor(picture).float() / BYTE
