# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportArgumentType=false
# scipy has no type stubs.
"""A proven lower bound on the communication of every division that keeps the balance, by integer programs for HiGHS.

A program chooses how many stages of each kind every group has, and how many hops there are between any two hosts: its
layers are the model's, sort by sort, no device is used twice, a host is left as often as it is entered but for the
pipeline's ends, and no set of hosts is used without being entered. Layers' order is left out; all divisions are
among its solutions, and where layers are alike nothing else is. Where the stages' mean time lies in an interval, those
outside its window are left out, and Σ(t − low) ≥ 0 ≥ Σ(t − high): intervals are halved while that raises the bound.
scipy is imported where it is called: that takes longer than most plans.
"""

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain, combinations, count
from math import inf, isfinite
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from apportion.planner.communication.tables import LinkTables
from apportion.planner.communication.window import ROUNDING, Window
from apportion.types.workload import BalanceLimit

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SOLVER_TOLERANCE = 1e-6
"""Relative: what is not looked for, and what HiGHS may be wrong by."""
SHORT = 1 / 1024
"""Of ε: intervals that are not halved any more."""
MAX_PROGRAMS = 150
MAX_NODES = 2000
"""Of one program: beyond, its dual bound is taken. No limit of time, so that every machine finds the same."""
MAX_HOSTS_OF_ALL_SETS = 5
"""With more hosts only single ones are kept from being used without being entered."""
INFEASIBLE = 2
"""Status of scipy.optimize.milp."""


@dataclass(frozen=True, slots=True)
class _Items:
    """Stages that a division may have: kinds of a group in a weight format."""

    group: IntArray
    kind: IntArray
    links_s: FloatArray
    """With the coordinator's where the stage is first or last."""
    least_s: FloatArray
    most_s: FloatArray
    """Of a step: the same where shares are numbered."""

    def __len__(self) -> int:
        return len(self.group)

    def within(self, window: Window) -> "_Items":
        inside = (self.least_s <= window.most_s) & (self.most_s >= window.least_s)
        return _Items(
            self.group[inside],
            self.kind[inside],
            self.links_s[inside],
            np.maximum(self.least_s[inside], window.least_s),
            np.minimum(self.most_s[inside], window.most_s),
        )


@dataclass(frozen=True, slots=True)
class Proven:
    seconds: float
    method: str


class CommunicationBound:
    """`value` is the communication of a division."""

    def __init__(self, tables: LinkTables, value: float) -> None:
        self.tables = tables
        self.value = value
        self.programs = 0
        joined = tables.joined()
        self.entry, self.exit, self.hop = joined.entry, joined.exit, joined.hop
        self.host_of = np.array(tables.host_of)
        self.items = self._items()

    def prove(self, limit: BalanceLimit | None) -> Proven:
        """On the divisions that keep the limit."""
        if len(self.items) == 0:
            return Proven(self.value, "no stage takes as little")
        low, high = float(self.items.least_s.min()), float(self.items.most_s.max())
        whole = self._least(Window(BalanceLimit(seconds=inf), low, high))
        enough = self.value * (1 - SOLVER_TOLERANCE)
        if limit is None or whole >= enough:
            return self._proven(whole)
        tie = count()
        windows = [(whole, next(tie), Window(limit, low, high))]
        while windows[0][0] < enough and self.programs < MAX_PROGRAMS:
            seconds, _, window = windows[0]
            if window.narrower_than(SHORT):
                break
            heappop(windows)
            for half in window.halves():
                heappush(windows, (max(seconds, self._least(half)), next(tie), half))
        return self._proven(windows[0][0])

    def _proven(self, seconds: float) -> Proven:
        number = f"{self.programs} integer program{'s' if self.programs > 1 else ''}"
        return Proven(min(seconds, self.value), f"{number} over groups, layers and hops in any order (HiGHS)")

    def _items(self) -> _Items:
        """All that may be part of a division no worse than `value`."""
        kinds, parts = self.tables.kinds, list[tuple[IntArray, ...]]()
        first, last = kinds.has_embedding, kinds.has_head
        ends = self.entry.min(), self.exit.min()
        for number, costs in enumerate(self.tables.costs):
            join = np.where(first, self.entry[number], 0) + np.where(last, self.exit[self.host_of[number]], 0)
            others = np.where(first, 0, ends[0]) + np.where(last, 0, ends[1])
            for least_s, most_s, links_s in zip(
                costs.least_step_s, costs.most_step_s, costs.least_links_s, strict=True
            ):
                placed = self.tables.places.of_kinds(number, least_s)
                kept = np.flatnonzero(
                    np.isfinite(placed) & (links_s + join + others <= self.value * (1 + SOLVER_TOLERANCE))
                )
                whole = (
                    np.full(len(kept), number),
                    kept,
                    (links_s + join)[kept],
                    least_s[kept],
                    most_s[kept],
                )
                parts.append(whole)
        return _Items(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _least(self, window: Window) -> float:
        """Seconds that no division with its mean in the window is below, at most `value`."""
        items = self.items.within(window)
        if len(items) == 0:
            return self.value
        self.programs += 1
        return _Program(self, items, window).solve()


class _Program:
    """Columns: how many of each item, hops by (source, destination, size of the group), which hosts are in use."""

    def __init__(self, bound: CommunicationBound, items: _Items, window: Window) -> None:
        tables = bound.tables
        self.bound, self.items, self.window = bound, items, window
        self.num_hosts = len(tables.hosts)
        self.hosts = bound.host_of[items.group]
        self.sizes: IntArray = np.array([group.size for group in tables.groups])[items.group]
        self.counts = np.array([tables.axes.used(group.counts) for group in tables.groups])[items.group]
        self.first, self.last = tables.kinds.has_embedding[items.kind], tables.kinds.has_head[items.kind]
        self.hops, self.hop_s = self._hops()
        self.num_columns = len(items) + len(self.hops) + self.num_hosts
        self.rows: list[tuple[FloatArray, float, float]] = []

    def _hops(self) -> tuple[list[tuple[int, int, int]], FloatArray]:
        known: dict[tuple[int, int, int], float] = {}
        groups = self.bound.tables.groups
        for number in map(int, np.unique(self.items.group[~self.first])):
            for src in range(self.num_hosts):
                seconds = float(self.bound.hop[src, number])
                if isfinite(seconds):
                    known[src, int(self.bound.host_of[number]), groups[number].size] = seconds
        return list(known), np.array(list(known.values()))

    def solve(self) -> float:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        self._cover_layers_and_devices()
        self._join()
        self._balance()
        value = self.bound.value
        costs = np.concatenate([self.items.links_s, self.hop_s, np.zeros(self.num_hosts)]) / value
        devices = float(sum(self.bound.tables.axes.available))
        self.rows.append((costs, -inf, 1.0))
        most = np.full(self.num_columns, devices)
        most[-self.num_hosts :] = 1
        result = cast(
            Any,
            milp(
                costs,
                constraints=LinearConstraint(
                    csr_array(np.array([row for row, _, _ in self.rows])),
                    np.array([low for _, low, _ in self.rows]),
                    np.array([high for _, _, high in self.rows]),
                ),
                bounds=Bounds(0, most),
                integrality=np.ones(self.num_columns),
                # Presolved, HiGHS writes to stdout where a solution is off by rounding, and takes longer.
                options={"mip_rel_gap": SOLVER_TOLERANCE / 2, "node_limit": MAX_NODES, "presolve": False},
            ),
        )
        if result.status == INFEASIBLE:
            return value * (1 - SOLVER_TOLERANCE)
        dual = result.mip_dual_bound
        proven = float(dual) if dual is not None and isfinite(dual) else 0.0
        return max(0.0, proven) * (1 - SOLVER_TOLERANCE / 2) * value

    def _add(
        self,
        low: float,
        high: float,
        *,
        items: NDArray[Any] | None = None,
        hops: NDArray[Any] | None = None,
        host: tuple[int, float] | None = None,
    ) -> None:
        row = np.zeros(self.num_columns)
        if items is not None:
            row[: len(self.items)] = items
        if hops is not None:
            row[len(self.items) : len(self.items) + len(self.hops)] = hops
        if host is not None:
            row[-self.num_hosts + host[0]] = host[1]
        self.rows.append((row, low, high))

    def _cover_layers_and_devices(self) -> None:
        tables = self.bound.tables
        self._add(1, 1, items=self.first)
        self._add(1, 1, items=self.last)
        layers = tables.kinds.counts[self.items.kind]
        for sort, name in enumerate(tables.kinds.layers):
            total = tables.problem.model.layers.count(name)
            self._add(total, total, items=layers[:, sort])
        for axis, (least, most) in enumerate(zip(tables.axes.least, tables.axes.available, strict=True)):
            self._add(least, most, items=self.counts[:, axis])

    def _join(self) -> None:
        """As many hops into a host as stages there but for the first, out of it but for the last."""
        hops: IntArray = np.array(self.hops, dtype=np.int64).reshape(-1, 3)
        src, dst, size = hops.T
        for host in range(self.num_hosts):
            here = self.hosts == host
            for number in np.unique(self.sizes[here & ~self.first]):
                arriving = here & ~self.first & (self.sizes == number)
                self._add(0, 0, items=-1.0 * arriving, hops=(dst == host) & (size == number))
            self._add(0, 0, items=-1.0 * (here & ~self.last), hops=src == host)
            most = float(here.sum() and sum(self._devices(host)))
            self._add(-inf, 0, items=here, host=(host, -most))
        for inside in self._sets():
            members = np.array(sorted(inside))
            entered = np.isin(dst, members) & ~np.isin(src, members)
            begun = np.isin(self.hosts, members) & self.first
            for host in inside:
                self._add(0, inf, items=begun, hops=entered, host=(host, -1.0))

    def _devices(self, host: int) -> list[int]:
        axes, name = self.bound.tables.axes, self.bound.tables.hosts[host]
        return [number for number, where in zip(axes.available, axes.hosts, strict=True) if where == name]

    def _sets(self) -> list[tuple[int, ...]]:
        """Of hosts, each of which is entered from outside, or has the first stage, where one of its hosts is in use."""
        hosts = range(self.num_hosts)
        most = self.num_hosts - 1 if self.num_hosts <= MAX_HOSTS_OF_ALL_SETS else 1
        return list(chain.from_iterable(combinations(hosts, size) for size in range(1, most + 1)))

    def _balance(self) -> None:
        """Σ(t − low) ≥ 0 ≥ Σ(t − high), in units of the mean."""
        window, items = self.window, self.items
        if window.limit.seconds == inf:
            return
        self._add(-inf, ROUNDING, items=items.least_s / window.high - 1)
        self._add(-ROUNDING, inf, items=items.most_s / window.low - 1)
