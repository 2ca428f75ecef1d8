"""Time by which files and records are kept: the wall clock as far as it can be believed."""

import logging
import time

log = logging.getLogger("wangpd")
MOST_OFF_S = 30 * 86400  # a machine is off for no longer; a wall clock that has gone on further was set wrongly
LONG_AGO_S = 3600
NTP_S = 60  # a smaller step back is no fault


class Clock:
    """Seconds since the epoch, to be compared with each other only: no step of the wall clock moves them.

    They go on with the machine's uptime; and over a restart, from an earlier `reading`, with the wall clock.
    """

    def __init__(self) -> None:
        self._start = time.time() - _uptime_s()

    def now(self) -> float:
        """The time."""
        return self._start + _uptime_s()

    def dated(self, at: float) -> float:
        """The time that was `at` by the wall clock, not long ago; now, if that clock has been moved since."""
        ago_s = time.time() - at
        return self.now() - (ago_s if 0 <= ago_s <= LONG_AGO_S else 0.0)

    def reading(self) -> tuple[float, float]:
        """This clock and the wall clock, now."""
        return self.now(), time.time()

    def resume(self, now: float, wall: float) -> None:
        """Go on from a `reading`, by what the wall clock has gone on meanwhile if that can be believed."""
        off_s = time.time() - wall
        if not -NTP_S <= off_s <= MOST_OFF_S:
            log.warning("the clock is %.1f days off what it was; no file or record ages by that", off_s / 86400)
            off_s = 0.0
        self._start = now + max(0.0, off_s) - _uptime_s()


def _uptime_s() -> float:
    """Seconds since some moment; those of a suspended machine too, where the system counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
