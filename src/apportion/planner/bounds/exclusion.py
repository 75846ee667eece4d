"""Ways to serve a workload for which no division is fast enough and keeps the limits.

Many are excluded together (bounds/limited_bound.py) where that succeeds, else in ever smaller parts.
"""

from collections.abc import Iterator, Sequence

from apportion.planner.bounds.limited_bound import LimitedBound
from apportion.planner.bounds.ways import Ways
from apportion.planner.problem import Problem
from apportion.planner.stages.groups import possible_groups
from apportion.planner.stages.kinds import kinds_of

MAX_PARTS = 1000
"""That are looked into before giving up."""
GAPS_BY_PARTS = ((150, 1e-2), (50, 1e-3))
"""After so many parts a smaller gap is no longer tried for: parts near the best have to be split to single numbers for
it, and what is left when the parts run out would be excluded as a whole or not at all."""


class Exclusion:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.groups = possible_groups(problem)
        self.kinds = kinds_of(problem.model)
        self._bounds: dict[Ways, LimitedBound] = {}

    def excludes(self, ways: Ways, seconds: float, max_devices: int | None = None) -> bool:
        """Whether it is proven that no division, served in any of these ways, keeps the limits and takes at most
        `seconds` per output token."""
        return next(self.hopeful(ways, seconds, max_devices), None) is None

    def hopeful(self, ways: Ways, seconds: float, max_devices: int | None = None) -> Iterator[Ways]:
        """Those that are not excluded, one by one while there are not too many."""
        left, looked_into = [ways], 0
        while left:
            part = left.pop()
            looked_into += 1
            if not self._bound(part).excluded(seconds, max_devices):
                parts = tuple(part.split()) if looked_into < MAX_PARTS else ()
                left += parts
                if not parts:
                    yield part

    def best_proven(self, ways: Ways, value: float, gaps: Sequence[float]) -> float:
        """The least of these gaps, ascending, for which nothing is as much as that below `value`; 1 for none."""
        left, wider, looked_into = [ways], iter(gaps), 0
        gap = next(wider)
        while left and gap < 1:
            part = left.pop()
            looked_into += 1
            least = next((least for parts, least in GAPS_BY_PARTS if looked_into > parts), 0.0)
            while gap < least:
                gap = next(wider, 1.0)
            while gap < 1 and not self._bound(part).excluded(value * (1 - gap), self.problem.max_devices):
                parts = tuple(part.split()) if looked_into < MAX_PARTS else ()
                if parts:
                    left += parts
                    break
                gap = next(wider, 1.0)
        return gap

    def _bound(self, ways: Ways) -> LimitedBound:
        if ways not in self._bounds:
            self._bounds[ways] = LimitedBound(self.problem, ways, self.groups, self.kinds)
        return self._bounds[ways]
