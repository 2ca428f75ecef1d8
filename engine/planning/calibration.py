"""A step cache skips steps while their expected error is under a threshold; finds the one for a wanted speed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rtoml

CONSTANTS: Mapping[str, Any] = rtoml.load(Path(__file__).with_suffix(".toml"))  # its tables: magcache and teacache
MAX_SKIPS = 2  # steps in a row that MagCache skips


def ratios(name: str, steps: int) -> list[float]:
    """The magnitude ratios of a calibration, stretched to `steps` by the nearest neighbour."""
    known = CONSTANTS["magcache"][name]["ratios"]
    return [known[round(i * (len(known) - 1) / (steps - 1))] for i in range(steps)] if steps > 1 else [known[-1]]


def mag_schedule(mag_ratios: Sequence[float], threshold: float, warm_steps: int) -> list[bool]:
    """For each step, whether MagCache computes it. The first `warm_steps` always are."""
    schedule, product, error, skipped = [], 1.0, 0.0, 0
    for step, ratio in enumerate(mag_ratios):
        product, skipped = product * ratio, skipped + 1
        error += abs(1 - product)
        compute = step < max(1, warm_steps) or error > threshold or skipped > MAX_SKIPS
        schedule.append(compute)
        if compute:
            product, error, skipped = 1.0, 0.0, 0
    return schedule


def tea_schedule(
    coefficients: Sequence[float], changes: Sequence[float], threshold: float, warm_steps: int
) -> list[bool]:
    """For each step, whether TeaCache computes it. The first `warm_steps` and the last always are.

    `changes`: of the time embedding, relative, to the next step; `coefficients`: of their polynomial, highest first.
    """
    schedule, distance = [True], 0.0
    for step, change in enumerate(changes, start=1):
        distance = 0.0 if schedule[-1] else distance
        distance += abs(sum(factor * change**power for power, factor in enumerate(reversed(coefficients))))
        schedule.append(step < warm_steps or step == len(changes) or distance >= threshold)
    return schedule


def threshold_for(multiplier: float, schedule: Callable[[float], list[bool]]) -> float:
    """The smallest threshold with which the number of computed steps comes nearest to 1/`multiplier` of all."""
    target = int(len(schedule(0.0)) / multiplier)
    return min((i / 100 for i in range(1, 61)), key=lambda threshold: abs(sum(schedule(threshold)) - target))
