"""A daemon whose worker is a stand-in."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from engine.gpu.save import encode
from tests.daemon import ROOT, Daemon
from tests.stub_daemon import WORKER
from tests.stub_worker import CLIP


class StubDaemon(Daemon):
    """A Daemon whose worker runs `function`, of a module that brings in nothing heavy."""

    def __init__(self, folder: Path, function: Any, **config: Any) -> None:
        super().__init__(folder, **config)
        self.program = ["-m", "tests.stub_daemon"]
        clip = folder / "clip.mp4"
        encode.write_video(clip, np.zeros((5, 32, 32, 3), np.uint8), 8, None)
        name = f"{function.__module__}:{function.__name__}"
        self.environment = {**os.environ, WORKER: name, CLIP: str(clip), "PYTHONPATH": str(ROOT)}
