"""The log, in every process: one's own lines on standard error, silent libraries, and floods that are counted."""

import asyncio
import logging
import sys

MINUTE_S = 60.0


def set_up(level: str) -> None:
    """Log wangpd's own lines from `level` on. Libraries, and Python's warnings, are heard in debug, or if they fail."""
    others = logging.DEBUG if level == "debug" else logging.ERROR
    logging.basicConfig(stream=sys.stderr, level=others, format="%(name)s: %(message)s")
    logging.getLogger("wangpd").setLevel(level.upper())
    logging.captureWarnings(True)


class Counted:
    """What may happen thousands of times: the first time is logged at once, all others as their number each minute."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._count = log, 0
        self._minute: asyncio.TimerHandle | None = None

    def happened(self, what: str) -> None:
        """Log or count it; the sentence of the last one is logged."""
        self._what, self._count = what, self._count + 1
        if self._minute is None:
            self._tell()

    def _tell(self) -> None:
        self._minute = None
        if self._count:
            times = f"{self._count:,} times in a minute: " if self._count > 1 else ""
            self._log.warning("%s%s", times, self._what)
            self._count, self._minute = 0, asyncio.get_running_loop().call_later(MINUTE_S, self._tell)
