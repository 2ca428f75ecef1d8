"""A clock that can be set: wall time is the machine's own plus the float64 in the file that WANGPD_TEST_CLOCK names.

Python imports this module at its start wherever its folder is on PYTHONPATH, in the daemon and in its workers alike.
Monotonic clocks, the kernel's time stamps and SQLite's own clock stay as they are.
"""

import datetime as real
import mmap
import os
import time
from pathlib import Path

REAL_TIME, REAL_TIME_NS = time.time, time.time_ns

if path := os.environ.get("WANGPD_TEST_CLOCK"):
    with Path(path).open("rb") as file:
        offset_s = memoryview(mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)).cast("d")

    class datetime(real.datetime):
        """The same, with such a `now`."""

        @classmethod
        def now(cls, tz: real.tzinfo | None = None) -> "datetime":
            return cls.fromtimestamp(time.time(), tz)

        @classmethod
        def utcnow(cls) -> "datetime":
            return cls.now(real.UTC).replace(tzinfo=None)

    time.time = lambda: REAL_TIME() + offset_s[0]
    time.time_ns = lambda: REAL_TIME_NS() + int(offset_s[0] * 1e9)
    real.datetime = datetime  # type: ignore[misc]
