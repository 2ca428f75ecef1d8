"""A stand-in for torchvision, for tests only: just what diffusers' and transformers' classes use."""

from . import io, transforms

__all__ = ["io", "transforms"]
__version__ = "0.28.0+standin"
