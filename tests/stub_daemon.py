"""wangpd with another function in the place of the worker's `generate`: a real daemon, a real process, no torch.

`python -m tests.stub_daemon --config FILE`; STUB_WORKER names the function, as `module:function`. WALL_CLOCK may name a
file with the seconds by which the wall clock is wrong. It imports nothing of the tests' own, so that it stays as small
and as quick to start as the daemon is.
"""

import importlib
import os
import sys
import time
from pathlib import Path

WORKER = "STUB_WORKER"
CLOCK = "WALL_CLOCK"


def main() -> int:
    """Run the daemon; returns the exit code."""
    if file := os.environ.get(CLOCK):
        right = time.time
        time.time = lambda: right() + float(Path(file).read_text())
    import wangpd  # here: the worker's process imports this module too, and needs no HTTP
    from engine.gpu import worker

    module, _, function = os.environ[WORKER].partition(":")
    worker.generate = getattr(importlib.import_module(module), function)
    return wangpd.main()


if __name__ == "__main__":
    sys.exit(main())
