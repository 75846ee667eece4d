"""The exact search: which devices, grouped how, in which order, with which layers.

Dynamic programming over (devices used, host of the last group, layer): the least path cost of reaching a state
with no stage or link occupied beyond a limit, and threshold.py over that limit. Identical devices of a host are
interchangeable, so only how many of each kind are used is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apportion.cost.objective import Goal, Timing
from apportion.cost.shard import layer_counts
from apportion.cost.traffic import host_link
from apportion.planner.axes import StageKind
from apportion.planner.joins import Joins
from apportion.planner.problem import Problem
from apportion.planner.shares import GroupMemory, GroupShares, StageChoice
from apportion.planner.threshold import minimise
from apportion.types.cluster import Device
from apportion.types.model import ModelSpec

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Used = tuple[int, ...]
"""How many devices of each kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A tensor-parallel group as kinds of devices; a single device is a group of one."""

    counts: Used
    devices: tuple[Device, ...]
    """Representatives in rank order, which is the cluster's order of kinds."""

    @property
    def host(self) -> str:
        return self.devices[0].host

    @property
    def size(self) -> int:
        return len(self.devices)


class PlacedStage(NamedTuple):
    group: Group
    layer_start: int
    layer_stop: int
    choice: StageChoice


@dataclass(frozen=True, slots=True)
class Division:
    """Stages in order; `total` = Σ path costs, `maximum` = the most occupied stage or link (seconds)."""

    stages: tuple[PlacedStage, ...]
    total: float
    maximum: float


def device_kinds(devices: Sequence[Device]) -> tuple[tuple[Device, ...], ...]:
    """Devices alike in all but name, in order of first appearance."""
    kinds: dict[object, list[Device]] = {}
    for device in devices:
        rates = tuple(sorted(device.flops_per_s.items()))
        key = (device.host, device.kind, device.memory_bytes, device.reserved_bytes)
        key += (device.mem_bytes_per_s, rates, device.layer_overhead_s, device.step_overhead_s)
        kinds.setdefault(key, []).append(device)
    return tuple(tuple(members) for members in kinds.values())


def possible_groups(problem: Problem) -> tuple[Group, ...]:
    """Every multiset of device kinds on one host, of at most `kv_heads` members, with a link and cores for all."""
    kinds = device_kinds(problem.cluster.devices)
    return tuple(
        Group(counts=counts, devices=devices)
        for counts in product(*(range(len(kind) + 1) for kind in kinds))
        for devices in [tuple(d for kind, count in zip(kinds, counts, strict=True) for d in kind[:count])]
        if len({device.host for device in devices}) == 1 and len(devices) <= problem.model.kv_heads
        if len(devices) == 1 or host_link(problem.cluster, devices[0].host, devices[0].host)
        if _have_cores(devices)
    )


def _have_cores(devices: Sequence[Device]) -> bool:
    """Members of a group compute at the same time: without a core for each thread they would wait for each other."""
    cpus = [device for device in devices if device.kind == "cpu"]
    num_threads = sum(device.num_threads for device in cpus)
    return len(cpus) <= 1 or cpus[0].host_cores is None or num_threads <= cpus[0].host_cores


class StageKinds:
    """Numbers the kinds of stages of a model: `index[a, b]` is the kind of layers [a, b), −1 where b ≤ a."""

    def __init__(self, model: ModelSpec) -> None:
        size = model.num_layers + 1
        self.index: IntArray = np.full((size, size), -1, dtype=np.int64)
        self.kinds: list[StageKind] = []
        numbers: dict[tuple[object, ...], int] = {}
        names = list(dict.fromkeys(model.layers))
        seen = [[model.layers[:stop].count(name) for name in names] for stop in range(size)]
        for start in range(size - 1):
            for stop in range(start + 1, size):
                counts = (b - a for a, b in zip(seen[start], seen[stop], strict=True))
                key = (*counts, start == 0, stop == size - 1)
                if key not in numbers:
                    numbers[key] = len(self.kinds)
                    self.kinds.append(stage_kind(model, start, stop))
                self.index[start, stop] = numbers[key]


def stage_kind(model: ModelSpec, start: int, stop: int) -> StageKind:
    return StageKind(
        layers=layer_counts(model.layers[start:stop]),
        has_embedding=start == 0,
        has_head=stop == model.num_layers,
    )


@dataclass(slots=True)
class Frontier:
    """Least path cost of ending layer b with given devices used, and the stage [start, b) it ends with."""

    cost: FloatArray
    start: IntArray
    group: IntArray
    previous: list["Frontier | None"]

    @classmethod
    def empty(cls, size: int) -> "Frontier":
        minus_one = np.full(size, -1, dtype=np.int64)
        return cls(np.full(size, inf), minus_one, minus_one.copy(), [None] * size)

    def improve(self, cost: FloatArray, start: IntArray, group: int, previous: "Frontier | None") -> None:
        better = np.flatnonzero(cost < self.cost)
        self.cost[better] = cost[better]
        self.start[better] = start[better]
        self.group[better] = group
        for stop in better:
            self.previous[stop] = previous


class Search:
    """All divisions of a problem for one number of microbatches."""

    def __init__(
        self,
        problem: Problem,
        microbatches: int,
        groups: Sequence[Group],
        memories: Sequence[GroupMemory],
        stage_kinds: StageKinds,
    ) -> None:
        self.problem = problem
        self.goal: Goal = problem.goal(microbatches)
        self.steps = problem.steps(microbatches)
        self.joins = Joins(problem, self.steps)
        self.groups = groups
        self.stage_kinds = stage_kinds
        self.kind_counts = tuple(len(kind) for kind in device_kinds(problem.cluster.devices))
        self.choices = [self._choices(group, memory) for group, memory in zip(groups, memories, strict=True)]
        self.path = [self._matrix(choices, self.goal.path_s) for choices in self.choices]
        self.occupied = [self._matrix(choices, self.goal.occupied_s) for choices in self.choices]

    def _choices(self, group: Group, memory: GroupMemory) -> list[StageChoice | None]:
        link = host_link(self.problem.cluster, group.host, group.host) if group.size > 1 else None
        shares = GroupShares(memory, link, self.goal, self.steps)
        return [shares.choose(kind) for kind in self.stage_kinds.kinds]

    def _matrix(self, choices: Sequence[StageChoice | None], cost: Callable[[Timing], float]) -> FloatArray:
        values = [inf if choice is None else cost(choice.timing) for choice in choices]
        return np.array([*values, inf])[self.stage_kinds.index]

    def best(self) -> Division | None:
        return minimise(self.solve, self.goal.combine)

    def solve(self, limit: float) -> Division | None:
        """The least path cost with every stage and link occupied for at most `limit`."""
        size = self.problem.model.num_layers + 1
        path = [
            np.where(occupied <= limit, cost, inf)
            for cost, occupied in zip(self.path, self.occupied, strict=True)
        ]
        frontiers: dict[tuple[Used, str], Frontier] = {}
        for number, group in enumerate(self.groups):
            entry = self._path_s(self.joins.entry(group.host, group.size), limit)
            if entry is not None:
                frontier = frontiers.setdefault((group.counts, group.host), Frontier.empty(size))
                frontier.improve(path[number][0] + entry, np.zeros(size, dtype=np.int64), number, None)
        for used in product(*(range(count + 1) for count in self.kind_counts)):
            for host in {group.host for group in self.groups}:
                if (used, host) in frontiers:
                    self._extend(frontiers, used, host, path, limit)
        return self._cheapest(frontiers, limit)

    def _path_s(self, timing: Timing | None, limit: float) -> float | None:
        """A link's path cost; None where there is no link or it is occupied beyond the limit."""
        if timing is None or self.goal.occupied_s(timing) > limit:
            return None
        return self.goal.path_s(timing)

    def _extend(
        self,
        frontiers: dict[tuple[Used, str], Frontier],
        used: Used,
        host: str,
        path: Sequence[FloatArray],
        limit: float,
    ) -> None:
        before = frontiers[used, host]
        for number, group in enumerate(self.groups):
            after = tuple(a + b for a, b in zip(used, group.counts, strict=True))
            hop = self._path_s(self.joins.hop(host, group.host, group.size), limit)
            if hop is None or any(a > most for a, most in zip(after, self.kind_counts, strict=True)):
                continue
            costs = before.cost[:, None] + path[number]
            start = costs.argmin(axis=0)
            least = costs[start, np.arange(len(start))] + hop
            frontier = frontiers.setdefault((after, group.host), Frontier.empty(len(least)))
            frontier.improve(least, start, number, before)

    def _cheapest(self, frontiers: dict[tuple[Used, str], Frontier], limit: float) -> Division | None:
        ends = [
            (frontier.cost[-1] + leaving, frontier)
            for (_, host), frontier in frontiers.items()
            if (leaving := self._path_s(self.joins.exit(host), limit)) is not None and frontier.cost[-1] < inf
        ]
        if not ends:
            return None
        _, last = min(ends, key=lambda end: end[0])
        return self._division(list(self._trace(last))[::-1])

    def _trace(self, last: Frontier) -> Iterator[PlacedStage]:
        frontier: Frontier | None = last
        stop = self.problem.model.num_layers
        while frontier is not None:
            start, number = int(frontier.start[stop]), int(frontier.group[stop])
            choice = self.choices[number][int(self.stage_kinds.index[start, stop])]
            assert choice is not None
            yield PlacedStage(self.groups[number], start, stop, choice)
            frontier, stop = frontier.previous[stop], start

    def _division(self, stages: Sequence[PlacedStage]) -> Division:
        groups = [stage.group for stage in stages]
        links = [
            self.joins.entry(groups[0].host, groups[0].size),
            *(self.joins.hop(src.host, dst.host, dst.size) for src, dst in pairwise(groups)),
            self.joins.exit(groups[-1].host),
        ]
        timings = [stage.choice.timing for stage in stages] + [link for link in links if link is not None]
        return Division(
            tuple(stages),
            sum(self.goal.path_s(timing) for timing in timings),
            max(self.goal.occupied_s(timing) for timing in timings),
        )
