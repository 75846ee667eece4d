"""Exact minimisation of a sum and a maximum together, by limiting the maximum.

`solve(limit)` returns a solution with the least sum among those whose maximum is at most `limit`. As the limit
falls the sum can only rise, so between a limit and a solved maximum nothing is better than that solution's sum
combined with the limit: intervals that cannot hold a better value are dropped, the others halved.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from math import inf
from typing import Protocol, TypeVar

TOLERANCE = 1e-12
"""Relative: differences below it are rounding."""


class Solution(Protocol):
    @property
    def total(self) -> float: ...
    @property
    def maximum(self) -> float: ...


S = TypeVar("S", bound=Solution)


def minimise(
    solve: Callable[[float], S | None], combine: Callable[[float, float], float], lowest: float = 0.0
) -> S | None:
    """The solution with the least `combine(total, maximum)`, to a relative 1e-12; None where there is none.

    `combine` is nondecreasing in both; `lowest` bounds every solution's maximum from below.
    """
    best = solve(inf)
    if best is None:
        return None
    best_value = combine(best.total, best.maximum)
    intervals = [(lowest, best)]
    while intervals:
        low, upper = intervals.pop()
        if combine(upper.total, low) >= best_value * (1 - TOLERANCE):
            continue
        middle = (low + upper.maximum) / 2
        intervals.append((middle, upper))
        found = solve(middle)
        if found is None:
            continue
        intervals.append((low, found))
        value = combine(found.total, found.maximum)
        if value < best_value:
            best, best_value = found, value
    return best


def minimise_over(
    solve: Callable[[float], S | None],
    combine: Callable[[float, float], float],
    maxima: Sequence[float],
    cutoff: float = inf,
    tolerance: float = TOLERANCE,
    part: float = 0.0,
) -> S | None:
    """As `minimise`, to a relative `tolerance`, where every solution's maximum is one of `maxima` (ascending).

    None where none beats `cutoff`; none is better than the one given by more than `part` of what that gains on it.
    """

    def hopeful(total: float, end: int) -> int:
        """How many of the first `end` maxima could be those of a better solution of at least this total."""
        aim = best_value * (1 - tolerance) - (part * (cutoff - best_value) if part else 0.0)
        return bisect_left(maxima, aim, 0, end, key=lambda maximum: combine(total, maximum))

    best: S | None = None
    best_value = cutoff
    # Solutions with a maximum in maxima[low:high] have at least this total; first the highest limit is tried.
    intervals = [(0, len(maxima), 0.0)]
    first = True
    while intervals:
        low, high, total = intervals.pop()
        high = hopeful(total, high)
        if low >= high:
            continue
        middle, first = high - 1 if first else (low + high) // 2, False
        found = solve(maxima[middle])
        intervals.append((middle + 1, high, total))
        if found is None:
            continue
        # With a larger maximum than its own, and a total that is no less, nothing is better than it.
        intervals.append((low, bisect_left(maxima, found.maximum * (1 - TOLERANCE)), found.total))
        value = combine(found.total, found.maximum)
        if value < best_value:
            best, best_value = found, value
    return best
