"""Which observations are learned from: those of a machine that did nothing else, at its usual clock.

The others stay in the file. A run on a busy machine says so itself; one at another clock is recognised beside the
fastest of the same hardware; whatever else disturbed a run (first use, a cold disk) shows as a ratio to the assumed
constants far from the median of many.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import log
from statistics import median

from apportion.calibrate.observation import Observation
from apportion.probe.watch import BUSY_SHARE

SLOW_CLOCK = 0.85
"""Of the fastest seen; turbo steps are smaller."""
MOST_DEVIATIONS, LEAST_FACTOR = 3.0, 1.5
"""An outlier is so many standard deviations and so many times away from the median."""
ENOUGH = 4
"""Observations, from which on a median says what is usual."""
_NORMAL = 1.4826
"""Times the median absolute deviation is a normal distribution's standard deviation."""


def undisturbed(seen: Sequence[Observation]) -> list[Observation]:
    """Of one hardware: those of a quiet machine at its usual clock."""
    quiet = [one for one in seen if one.others_share <= BUSY_SHARE]
    fastest = max((one.clock_hz for one in quiet if one.clock_hz is not None), default=0.0)
    return [one for one in quiet if one.clock_hz is None or one.clock_hz >= SLOW_CLOCK * fastest]


def without_outliers(
    seen: Sequence[Observation], assumed_s: Callable[[Observation], float]
) -> list[Observation]:
    """Of one hardware and format. `assumed_s` are the seconds by constants that no run has changed."""
    by_phase: dict[str, list[tuple[float, Observation]]] = defaultdict(list)
    for one in seen:
        by_phase[one.phase].append((log(one.measured_s / assumed_s(one)), one))
    return [one for ratios in by_phase.values() for one in _near_the_median(ratios)]


def _near_the_median(ratios: Sequence[tuple[float, Observation]]) -> list[Observation]:
    if len(ratios) < ENOUGH:
        return [one for _, one in ratios]
    centre = median(ratio for ratio, _ in ratios)
    deviation = _NORMAL * median(abs(ratio - centre) for ratio, _ in ratios)
    most = max(MOST_DEVIATIONS * deviation, log(LEAST_FACTOR))
    return [one for ratio, one in ratios if abs(ratio - centre) <= most]
