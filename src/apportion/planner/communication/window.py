"""The times that stages may have where their mean lies in an interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from apportion.types.workload import BalanceLimit

ROUNDING = 1e-9
"""Relative to the mean: by how much a stage may be beyond ε, as sums are rounded."""


@dataclass(frozen=True, slots=True)
class Window:
    """Divisions whose stages' mean time is in [low, high]; every stage is then in [least_s, most_s]."""

    limit: BalanceLimit
    low: float
    high: float

    @property
    def least_s(self) -> float:
        return (self.low - self.limit.epsilon_s(self.low)) * (1 - ROUNDING) - ROUNDING * self.low

    @property
    def most_s(self) -> float:
        return (self.high + self.limit.epsilon_s(self.high)) * (1 + ROUNDING)

    def narrower_than(self, part: float) -> bool:
        """Whether the interval is at most this part of the least ε in it."""
        return self.high - self.low <= part * self.limit.epsilon_s(self.low)

    def halves(self) -> tuple["Window", "Window"]:
        middle = sqrt(self.low * self.high)
        return Window(self.limit, self.low, middle), Window(self.limit, middle, self.high)


def keeps_balance(times_s: Sequence[float], limit: BalanceLimit | None) -> bool:
    if limit is None:
        return True
    mean_s = sum(times_s) / len(times_s)
    return max(abs(seconds - mean_s) for seconds in times_s) <= limit.epsilon_s(mean_s) + ROUNDING * mean_s
