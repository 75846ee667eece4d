"""Exact minimisation of a sum and a maximum together, by limiting the maximum.

`solve(limit)` returns a solution with the least sum among those whose maximum is at most `limit`. As the limit
falls the sum can only rise, so between a limit and a solved maximum nothing is better than that solution's sum
combined with the limit: intervals that cannot hold a better value are dropped, the others halved.
"""

from collections.abc import Callable
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
