"""The run folder: what lets a training stop anywhere and go on as if it had not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Publish by rename, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)


def load(path: Path, device: str = "cpu") -> dict[str, Any] | None:
    """The state, or None where there is none yet."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None
