"""Parcels: nested arguments for another process, with their tensors left out; those go from device to device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Blank:
    """The place of a tensor of this shape; one that lay in RAM is to lie there again."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    in_ram: bool

    @property
    def size_bytes(self) -> int:
        """Of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def filled(self, numbers: torch.Tensor) -> torch.Tensor:
        """The tensor whose bytes are `numbers`: (size_bytes,) uint8."""
        tensor = numbers.view(self.dtype).view(self.shape)
        return tensor.cpu() if self.in_ram else tensor


@dataclass(frozen=True)
class Parcel:
    """Nested lists and mappings, taken apart; it can be pickled."""

    leaves: list[Any]  # a Blank for each tensor
    structure: Any

    @property
    def blanks(self) -> list[Blank]:
        """Of its tensors, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Blank)]

    def unpacked(self, tensors: list[torch.Tensor]) -> Any:
        """What was packed, with these tensors in the places of the blanks."""
        missing = iter(tensors)
        leaves = [next(missing) if isinstance(leaf, Blank) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.structure)


def packed(value: Any) -> tuple[Parcel, list[torch.Tensor]]:
    """`value` without its tensors, and the tensors."""
    leaves, structure = pytree.tree_flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    blanks = [_blank(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return Parcel(blanks, structure), tensors


def _blank(tensor: torch.Tensor) -> Blank:
    return Blank(tuple(tensor.shape), tensor.dtype, tensor.device.type == "cpu")


def numbers(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor's bytes on `device`: (size_bytes,) uint8. Not every way between processes knows every dtype."""
    own = tensor.to(device).clone(memory_format=torch.contiguous_format)  # one number may be told of many times
    return own.view(-1).view(torch.uint8)
