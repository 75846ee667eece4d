"""The division with the least communication among those that keep the balance.

Where the mean of the stages' times lies in a given interval, every stage's time lies in a window, so dynamic
programming over (devices used, host, layer) without the stages outside of it bounds what any such division takes.
Intervals are taken in the order of that bound: where its division keeps the balance no other is better, else the
interval is halved. In a short one the divisions are listed in the order of what they take, from the last stage to the
first, with the program's own table as an exact estimate of the rest, until one keeps the balance.
Of divisions that take the same the fastest: a step's time counts too, at most 1e-10 of the least communication.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apportion.planner.communication.tables import LinkTables
from apportion.planner.communication.window import Window, keeps_balance
from apportion.planner.search.division import PlacedStage
from apportion.planner.search.pipeline import Joined, Pipelines
from apportion.types.workload import BalanceLimit

FloatArray = NDArray[np.float64]

TIE = 1e-10
"""Relative: what a step's time adds to its communication, at most."""
SAME = 1e-9
"""Relative: less of a difference is rounding, or a tie."""
SHORT = 0.5
"""Of ε: intervals that are not halved any more."""
MAX_WINDOWS = 500
"""Intervals that are looked at; beyond, the search is cut short."""
MAX_LISTED = 10_000
"""Ends of divisions that are looked at in all the short intervals; beyond, the search is cut short."""


class Step(NamedTuple):
    """A stage of a division, by the numbers of its group, format and kind."""

    group: int
    weight_format: int
    layer_start: int
    layer_stop: int


@dataclass(frozen=True, slots=True)
class _Ways:
    """What one window allows at least."""

    window: Window
    cost: float
    path: list[Step]


@dataclass(frozen=True, slots=True)
class _Costs:
    """Of the stages in one window."""

    by_format: list[FloatArray]
    """By group, [format, kind]; infinite outside of the window."""
    by_stop: list[FloatArray]
    """By group, [stop, layers − 1]."""
    table: FloatArray
    """Least cost of any first stages by [devices used, host of the last, stop]."""


class _End(NamedTuple):
    """The last stages of a division: `cost` is theirs and the least of the others."""

    cost: float
    number: int
    own: float
    state: int
    host: int
    stop: int
    steps: tuple[Step, ...]
    times_s: tuple[float, ...]


class LeastCommunication:
    def __init__(self, tables: LinkTables) -> None:
        self.tables = tables
        problem = tables.problem
        available = np.array(tables.axes.available)
        self.joined: Joined = tables.joined()
        self.pipelines = Pipelines(
            tables.groups,
            tables.hosts,
            tables.axes,
            problem.model.num_layers,
        )
        radices = np.cumprod([1, *(available + 1)])
        self.used: NDArray[np.int64] = np.arange(radices[-1])[:, None] // radices[:-1] % (available + 1)
        self.counts = [tables.axes.used(group.counts) for group in tables.groups]
        finite = [costs.step_s[np.isfinite(costs.step_s)] for costs in tables.costs]
        self.times_s = np.concatenate(finite) if finite else np.empty(0)
        least = self.joined.entry.min(initial=inf) + self.joined.exit.min(initial=inf)
        most = self.times_s.max(initial=0.0) * int(available.sum())
        self.per_second = TIE * least / most if most > 0 and np.isfinite(least) else 0.0
        self.listed = self.windows = 0

    @property
    def complete(self) -> bool:
        """Whether the last search looked at all that it had to."""
        return self.listed <= MAX_LISTED and self.windows <= MAX_WINDOWS

    def best(self, limit: BalanceLimit) -> tuple[PlacedStage, ...] | None:
        path = self._best(limit)
        return self._named(path) if path else None

    def times_of_best(self, limit: BalanceLimit) -> list[float]:
        """By stage; of none where there is none."""
        return [self._step_s(step) for step in self._best(limit)]

    def _best(self, limit: BalanceLimit) -> list[Step]:
        self.listed = self.windows = 0
        if len(self.times_s) == 0:
            return []
        tie = count()
        queue: list[tuple[float, int, _Ways]] = []
        found: tuple[float, list[Step]] = (inf, [])

        def add(window: Window) -> None:
            ways = self._ways(window)
            if ways is not None and ways.cost < found[0] * (1 - SAME):
                heappush(queue, (ways.cost, next(tie), ways))

        add(Window(limit, float(self.times_s.min()), float(self.times_s.max())))
        while queue and queue[0][0] < found[0] * (1 - SAME) and self.complete:
            ways = heappop(queue)[2]
            if self._kept(ways.path, limit):
                found = (ways.cost, ways.path)
            elif ways.window.narrower_than(SHORT):
                found = self._listed(ways.window, limit, found)
            else:
                for half in ways.window.halves():
                    add(half)
        return found[1]

    def _kept(self, path: list[Step], limit: BalanceLimit) -> bool:
        return keeps_balance([self._step_s(step) for step in path], limit)

    def _kind(self, step: Step) -> int:
        return int(self.tables.kinds.index[step.layer_start, step.layer_stop])

    def _step_s(self, step: Step) -> float:
        return float(self.tables.costs[step.group].step_s[step.weight_format, self._kind(step)])

    def _named(self, path: list[Step]) -> tuple[PlacedStage, ...]:
        return tuple(
            PlacedStage(
                self.tables.groups[step.group],
                step.layer_start,
                step.layer_stop,
                self.tables.costs[step.group].choice(step.weight_format, self._kind(step)),
            )
            for step in path
        )

    def _ways(self, window: Window) -> _Ways | None:
        """None where no division has its stages in the window."""
        costs = self._costs(window)
        placed = self.pipelines.cheapest(costs.table, costs.by_stop, self.joined)
        if placed is None:
            return None
        path: list[Step] = []
        for number, start, stop in placed[1]:
            by_format = costs.by_format[number][:, int(self.tables.kinds.index[start, stop])]
            path.append(Step(number, int(by_format.argmin()), start, stop))
        return _Ways(window, placed[0], path)

    def _costs(self, window: Window) -> _Costs:
        self.windows += 1
        by_format: list[FloatArray] = []
        for costs in self.tables.costs:
            within = (costs.step_s >= window.least_s) & (costs.step_s <= window.most_s)
            allowed = within & np.isfinite(costs.step_s)  # a window without a limit has no end
            seconds = costs.links_s + self.per_second * np.where(allowed, costs.step_s, 0.0)
            by_format.append(np.where(allowed, seconds, inf))
        by_stop = [
            self.tables.by_stop(number, seconds.min(axis=0)) for number, seconds in enumerate(by_format)
        ]
        return _Costs(by_format, by_stop, self.pipelines.costs(by_stop, self.joined))

    def _listed(
        self, window: Window, limit: BalanceLimit, found: tuple[float, list[Step]]
    ) -> tuple[float, list[Step]]:
        """The better of `found` and the first division in this window that keeps the balance."""
        costs, tie = self._costs(window), count()
        queue: list[_End] = []
        for (state, host), cost in np.ndenumerate(self.pipelines.ends(costs.table, self.joined)):
            if cost < found[0] * (1 - SAME):
                stop, leave = self.pipelines.num_layers, float(self.joined.exit[host])
                heappush(queue, _End(float(cost), next(tie), leave, state, host, stop, (), ()))
        seen: set[tuple[object, ...]] = set()
        while queue and self.listed <= MAX_LISTED:
            end = heappop(queue)
            if end.cost >= found[0] * (1 - SAME):
                break
            if end.stop == 0:
                if keeps_balance(end.times_s, limit):
                    return end.cost, list(end.steps)
                continue
            # Ends with the same devices, layers, and sum and extremes of times: the rest cannot tell them apart.
            times_s = end.times_s or (0.0,)
            figures = (sum(times_s), min(times_s), max(times_s))
            rounded = tuple(round(figure / (SAME * window.high)) for figure in figures)
            key = (end.state, end.host, end.stop, len(end.steps), rounded)
            if key in seen:
                continue
            seen.add(key)
            self.listed += 1
            for longer in self._longer(costs, end, tie):
                if longer.cost < found[0] * (1 - SAME) and self._mean_possible(window, longer):
                    heappush(queue, longer)
        return found

    def _mean_possible(self, window: Window, end: _End) -> bool:
        """Whether the mean may come to lie in the interval, with so many devices left as there are."""
        num = len(end.times_s)
        left = int(self.used[end.state].sum()) if end.stop else 0
        total = sum(end.times_s)
        over, under = total - num * window.high, num * window.low - total
        slack = left * (window.most_s - window.least_s) + SAME * window.high
        return over <= slack and under <= slack

    def _longer(self, costs: _Costs, end: _End, tie: "count[int]") -> Iterator[_End]:
        """With one more stage in front."""
        for number, counts in enumerate(self.counts):
            before = end.state - self.pipelines.added[number]
            if self.tables.host_of[number] != end.host or bool(
                (self.used[end.state] < np.array(counts)).any()
            ):
                continue
            by_format = costs.by_format[number]
            lengths = 1 + np.flatnonzero(np.isfinite(costs.by_stop[number][end.stop]))
            for start in (end.stop - lengths).tolist():
                if (start == 0) != (before == 0):
                    continue
                kind = int(self.tables.kinds.index[start, end.stop])
                for weight_format in np.flatnonzero(np.isfinite(by_format[:, kind])):
                    step = Step(number, int(weight_format), start, end.stop)
                    own = end.own + float(by_format[weight_format, kind])
                    steps = (step, *end.steps)
                    times_s = (self._step_s(step), *end.times_s)
                    if before == 0:
                        own += float(self.joined.entry[number])
                        if own < inf:
                            yield _End(own, next(tie), own, 0, -1, 0, steps, times_s)
                        continue
                    arriving = own + self.joined.hop[:, number]
                    rest = arriving + costs.table[before, :, start]
                    for host in np.flatnonzero(np.isfinite(rest)):
                        yield _End(
                            float(rest[host]),
                            next(tie),
                            float(arriving[host]),
                            before,
                            int(host),
                            start,
                            steps,
                            times_s,
                        )
