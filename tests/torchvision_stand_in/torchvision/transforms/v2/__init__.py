"""The second version of the transforms has the same functions under the same names here."""

from . import functional
from .functional import InterpolationMode

__all__ = ["InterpolationMode", "functional"]
