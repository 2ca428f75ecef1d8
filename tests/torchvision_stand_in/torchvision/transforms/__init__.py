"""The transforms as objects, over the functions of `functional`."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from . import functional
from .functional import InterpolationMode

__all__ = ["Compose", "InterpolationMode", "Lambda", "Normalize", "ToTensor", "functional"]


class Compose:
    """All of `transforms`, one after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


class Lambda:
    """A function as a transform."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, value: Any) -> Any:
        return self.function(value)


class ToTensor:
    """See `functional.to_tensor`."""

    def __call__(self, picture: Image.Image) -> Tensor:
        return functional.to_tensor(picture)


class Normalize:
    """See `functional.normalize`."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        self.mean, self.std, self.inplace = mean, std, inplace

    def __call__(self, image: Tensor) -> Tensor:
        return functional.normalize(image, self.mean, self.std, self.inplace)
