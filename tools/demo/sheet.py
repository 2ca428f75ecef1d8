"""Contact sheets: a clip a row, frames from left to right, to be looked at by a person."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .sampling import Frames

COLUMNS = 9
GAP = 2
CAPTION_HEIGHT = 12


def _row(caption: str, clip: Frames) -> Image.Image:
    """One clip under its prompt."""
    chosen = np.linspace(0, len(clip) - 1, min(COLUMNS, len(clip))).round().astype(int)
    height, width = clip.shape[1:3]
    row = Image.new("RGB", (len(chosen) * (width + GAP), CAPTION_HEIGHT + height + GAP), (60, 60, 60))
    ImageDraw.Draw(row).text((2, 0), caption, fill=(255, 255, 255))
    for column, index in enumerate(chosen):
        row.paste(Image.fromarray(clip[index]), (column * (width + GAP), CAPTION_HEIGHT))
    return row


def write_sheet(path: Path, captions: Sequence[str], clips: Sequence[Frames]) -> None:
    """All the clips of a sheet have one size."""
    rows = [_row(caption, clip) for caption, clip in zip(captions, clips, strict=True)]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(path)
