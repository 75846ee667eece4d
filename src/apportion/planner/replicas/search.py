"""Which devices form which replica, and how many of the sequences each has.

What a set of devices is worth with a share of the sequences is a search of its own (build.py). So none is made
before it is needed: every set starts with an upper bound for each way of running it (replicas/ceilings.py), the best
packing of disjoint sets is found (replicas/packing.py), the most promising ways of those of its sets are searched that
may be worth less than they seem, and so on. Once all that the best packing is worth has been found, no other is better.
"""

from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.planner.divide import search
from apportion.planner.found import Found
from apportion.planner.replicas.packing import Packings
from apportion.planner.replicas.task import Item, ReplicaSets
from apportion.planner.stages.groups import Used, possible_groups

FloatArray = NDArray[np.float64]

CLOSE = 1 + 1e-9
"""Relative: tokens/s no further apart are equal."""
MAX_EFFORT = 1000
"""Groups of devices in all searches together, seconds to half a minute; then the best packing found is taken."""


class Candidate:
    """A set with a share, whose ways are searched from the most promising on."""

    def __init__(self, of: ReplicaSets, item: Item) -> None:
        self._of, self._item = of, item
        self._ways = of.ranked(item)
        self._next = 0
        self.found: Found | None = None

    @property
    def least(self) -> float:
        """Tokens/s of the best found."""
        return 1 / self._least_s if self.found else -inf

    @property
    def _least_s(self) -> float:
        return self.found.value if self.found else inf

    @property
    def most(self) -> float:
        left = self._ways[self._next].most if self._next < len(self._ways) else -inf
        return max(self.least, left)

    @property
    def known(self) -> bool:
        return self._next == len(self._ways) or self.least * CLOSE >= self.most

    def search(self) -> int:
        """The next way. Returns the number of groups."""
        way = self._ways[self._next].way
        self._next += 1
        problems = self._of.problems(self._item, way)
        found: Found | None = None
        for one in problems:
            least_s = found.value if found else self._least_s
            found = search(one, (way.microbatches,), least_s, self._of.kinds) or found
        if found is not None and 1 / found.value > self.least:
            self.found = found
        return len(possible_groups(problems[0]))


class ReplicaSearch:
    def __init__(self, of: ReplicaSets) -> None:
        self.of = of
        self.packings = Packings(of)
        self.worth = of.worth()
        self._candidates: dict[Item, Candidate] = {}
        self.effort = 0

    def best(self) -> list[tuple[Used, Found]] | None:
        """Sets of devices and their divisions; None where no packing holds the model."""
        while self.effort < MAX_EFFORT:
            packed = self.packings.best(self.worth)
            if packed is None:
                return None
            unknown = [item for item in dict.fromkeys(packed[1]) if not self._candidate(item).known]
            if not unknown:
                return self._divisions(packed[1])
            for item in unknown:
                self._search(item)
        packed = self.packings.best(self._found_worth())
        return packed and self._divisions(packed[1])

    def _divisions(self, items: list[Item]) -> list[tuple[Used, Found]]:
        found = [(self.of.counts(item), self._candidate(item).found) for item in items]
        return [(counts, one) for counts, one in found if one is not None]

    def _candidate(self, item: Item) -> Candidate:
        first = self.of.first_alike(item)
        if first not in self._candidates:
            self._candidates[first] = Candidate(self.of, first)
        return self._candidates[first]

    def _search(self, item: Item) -> None:
        candidate = self._candidate(item)
        if not candidate.known:
            self.effort += candidate.search()
            self.worth[self.of.alike == self.of.alike[item.set], item.share] = candidate.most

    def _found_worth(self) -> FloatArray:
        """Of what has been found alone."""
        worth = np.full_like(self.worth, -inf)
        for item, candidate in self._candidates.items():
            worth[self.of.alike == item.set, item.share] = candidate.least
        return worth
