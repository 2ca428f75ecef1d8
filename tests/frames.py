"""Look into the files that a daemon made."""

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def read_video(path: Path) -> NDArray[np.uint8]:
    """All frames of a video: (F, H, W, 3) uint8, RGB."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
