"""Time by which files and records are kept: the wall clock as far as it can be believed."""

import logging
import time

log = logging.getLogger("wangpd")
MOST_AWAY_S = 30 * 86400  # that a machine is off; a wall clock that has gone on further than that was set wrongly
LEAST_AWAY_S = -60  # small steps back are the work of NTP


class Clock:
    """Seconds since the epoch that no step of the wall clock moves. They are comparable with each other only.

    While the daemon runs they go on with the machine's uptime. What is saved as `reading` lets them go on over a
    restart, by what the wall clock has gone on meanwhile: up to 30 days, or not at all.
    """

    def __init__(self) -> None:
        self._start = time.time() - _uptime_s()

    def now(self) -> float:
        """The time."""
        return self._start + _uptime_s()

    def dated(self, at: float) -> float:
        """The time that was `at` by the wall clock, not long ago."""
        return self.now() + at - time.time()

    def reading(self) -> tuple[float, float]:
        """This clock and the wall clock, now."""
        return self.now(), time.time()

    def resume(self, believed: float, wall: float) -> None:
        """Go on from an earlier `reading`."""
        away_s = time.time() - wall
        if not LEAST_AWAY_S <= away_s <= MOST_AWAY_S:
            log.warning("the clock is %.1f days off what it was; no file or record ages by that", away_s / 86400)
            away_s = 0.0
        self._start = believed + max(0.0, away_s) - _uptime_s()


def _uptime_s() -> float:
    """Seconds since some moment, those of a suspended machine too where the system counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
