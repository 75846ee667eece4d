"""Stages' and links' costs within a limit, by group, in the forms the searches take them."""

from collections.abc import Callable, Sequence
from functools import partial
from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import Steps
from apportion.cost.objective import Goal, Timing
from apportion.planner.problem import Problem
from apportion.planner.search.joins import Joins
from apportion.planner.search.pipeline import Joined
from apportion.planner.search.selection import FIRST, LAST, ONLY, Choice, HostChoices
from apportion.planner.stages.groups import Group, device_axes
from apportion.planner.stages.kinds import StageKinds
from apportion.planner.stages.options import Options
from apportion.planner.stages.places import Places

FloatArray = NDArray[np.float64]
LinkCost = Callable[[Timing | None], float]
"""Infinite where there is no link, or it may not be used."""


class StageTables:
    def __init__(
        self,
        problem: Problem,
        goal: Goal,
        steps: Steps,
        groups: Sequence[Group],
        kinds: StageKinds,
        options: Sequence[Options],
    ) -> None:
        self.goal = goal
        self.joins = Joins(problem, steps)
        self.groups = groups
        self.kinds = kinds
        self.options = options
        """By group; those that are alike share them."""
        self.hosts = list(dict.fromkeys(device.host for device in problem.cluster.devices))
        self.axes = device_axes(problem)
        self.places = Places(problem, [group.devices for group in groups], kinds)
        stops = np.arange(problem.model.num_layers + 1)
        starts = stops[:, None] - 1 - np.arange(problem.model.num_layers)
        self._by_stop = np.where(starts >= 0, kinds.index[np.maximum(starts, 0), stops[:, None]], -1)

    def maxima(self) -> list[float]:
        """All that a stage or link may be occupied for, ascending."""
        distinct = {id(options): options for options in self.options}
        parts = [o.occupied_s[np.isfinite(o.path_s)] for o in distinct.values()]
        links = [link for link in self._links() if link is not None]
        parts.append(np.array([self.goal.occupied_s(link) for link in links]))
        return np.unique(np.concatenate(parts)).tolist()

    def _links(self) -> list[Timing | None]:
        joins = self.joins
        keys = {(group.host, group.size) for group in self.groups}
        links = [joins.entry(host, size) for host, size in keys]
        links += [joins.hop(src, host, size) for src in self.hosts for host, size in keys]
        return links + [joins.exit(host) for host in self.hosts]

    def joined(self, limit: float) -> Joined:
        return self._joined(partial(self.within, limit))

    def _joined(self, cost: LinkCost) -> Joined:
        joins = self.joins
        hops = {
            (src, host, size): cost(joins.hop(src, host, size))
            for src in self.hosts
            for host, size in {(group.host, group.size) for group in self.groups}
        }
        return Joined(
            np.array([cost(joins.entry(group.host, group.size)) for group in self.groups]),
            np.array([[hops[src, group.host, group.size] for group in self.groups] for src in self.hosts]),
            np.array([cost(joins.exit(host)) for host in self.hosts]),
        )

    def within(self, limit: float, link: Timing | None) -> float:
        if link is None or self.goal.occupied_s(link) > limit:
            return inf
        return self.goal.path_s(link)

    def by_kind(self, limit: float) -> list[FloatArray]:
        """By group and kind of stage; one array for those that are alike."""
        within = {id(options): options.path_within(limit) for options in self.options}
        return [within[id(options)] for options in self.options]

    def by_stop(self, limit: float) -> list[FloatArray]:
        """[stop, layers − 1] by group, no wider than the most layers it may hold."""
        known: dict[int, FloatArray] = {}
        for options, path_s in zip(self.options, self.by_kind(limit), strict=True):
            if id(options) not in known:
                most = int(self.kinds.num_layers[np.isfinite(path_s)].max(initial=0))
                known[id(options)] = np.append(path_s, inf)[self._by_stop[:, :most]]
        return [
            self.places.of_stops(number, known[id(options)]) for number, options in enumerate(self.options)
        ]

    def host_choices(self, limit: float) -> list[HostChoices]:
        """The same by host, wherever in the model a stage of so many layers is cheapest."""
        return self.choices(self.by_kind(limit), partial(self.within, limit))

    def choices(self, by_kind: Sequence[FloatArray], link_cost: LinkCost) -> list[HostChoices]:
        """By host, of given costs by group and kind of stage; groups with the same array are alike."""
        joined = self._joined(link_cost)
        by_length: dict[int, FloatArray] = {}
        tables: list[FloatArray] = []
        for number, path_s in enumerate(by_kind):
            placed = self.places.of_kinds(number, path_s)
            if placed is not path_s:
                tables.append(self._by_length(placed))
                continue
            if id(path_s) not in by_length:
                by_length[id(path_s)] = self._by_length(path_s)
            tables.append(by_length[id(path_s)])
        return [self._host(number, tables, joined) for number in range(len(self.hosts))]

    def _by_length(self, by_kind: FloatArray) -> FloatArray:
        table = np.full((4, len(self.kinds.index)), inf)
        np.minimum.at(table, (self.kinds.position, self.kinds.num_layers), by_kind)
        return table

    def _host(self, number: int, by_length: Sequence[FloatArray], joined: Joined) -> HostChoices:
        host = self.hosts[number]
        axes = [axis for axis, where in enumerate(self.axes.hosts) if where == host]
        choices: list[Choice] = []
        for index, group in enumerate(self.groups):
            if group.host != host:
                continue
            path_s = by_length[index].copy()
            path_s[[FIRST, ONLY]] += joined.entry[index]
            path_s[[LAST, ONLY]] += joined.exit[number]
            choices.append(
                Choice(
                    group=index,
                    counts=tuple(self.axes.used(group.counts)[axis] for axis in axes),
                    path_s=path_s,
                    hop_s=float(joined.hop[:, index].min()),
                    cross_s=float(np.delete(joined.hop[:, index], number).min(initial=inf)),
                )
            )
        return HostChoices(
            tuple(self.axes.available[axis] for axis in axes),
            tuple(self.axes.least[axis] for axis in axes),
            tuple(choices),
        )
