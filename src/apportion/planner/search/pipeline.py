"""The least path cost of a division with no stage or link occupied beyond a limit, in the pipeline's order.

Dynamic programming over (how many devices of each kind are used, host of the last group, layer). States with as
many devices in use are taken together, and a group is added to all of them at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from apportion.planner.stages.groups import Axes, Group

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Placed(NamedTuple):
    group: int
    layer_start: int
    layer_stop: int


@dataclass(frozen=True, slots=True)
class Joined:
    """Path cost of joining, infinite where there is no link or it is occupied beyond the limit."""

    entry: FloatArray
    """By group, as the first."""
    hop: FloatArray
    """[host before, group]"""
    exit: FloatArray
    """By host."""


class Pipelines:
    def __init__(
        self,
        groups: Sequence[Group],
        hosts: Sequence[str],
        axes: Axes,
        num_layers: int,
        max_devices: int | None = None,
    ) -> None:
        self.groups = groups
        self.num_layers = num_layers
        self.host_of = [hosts.index(group.host) for group in groups]
        self.num_hosts = len(hosts)
        available, counts = np.array(axes.available), [axes.used(group.counts) for group in groups]
        radices = np.cumprod([1, *(available + 1)])
        self.num_states = int(radices[-1])
        self.added = [int(np.dot(radices[:-1], used)) for used in counts]
        used = np.arange(self.num_states)[:, None] // radices[:-1] % (available + 1)
        level = used.sum(axis=1)
        self.lacking: NDArray[np.bool_] = np.any(used < np.array(axes.least), axis=1)
        """States without a device that has to take part."""
        most = int(available.sum()) if max_devices is None else max_devices
        room = [(used + added <= available).all(axis=1) & (level + sum(added) <= most) for added in counts]
        self.steps = [
            (number, states)
            for total in range(1, int(level.max()))
            for number in range(len(groups))
            if len(states := np.flatnonzero(room[number] & (level == total)))
        ]

    def solve(self, stages: Sequence[FloatArray], joined: Joined) -> list[Placed] | None:
        """`stages[group]` is the path cost of a stage by [stop, layers − 1], infinite where it is not allowed."""
        found = self.cheapest(self.costs(stages, joined), stages, joined)
        return None if found is None else found[1]

    def costs(self, stages: Sequence[FloatArray], joined: Joined) -> FloatArray:
        """The least cost of first stages, by [state, host of the last, layer after it]."""
        size = self.num_layers + 1
        cost = np.full((self.num_states, self.num_hosts, size), inf)
        for number, stage in enumerate(stages):
            entry = cost[self.added[number], self.host_of[number], 1 : stage.shape[1] + 1]
            first = np.diagonal(stage[1:]) + joined.entry[number]
            np.minimum(entry, first, out=entry)
        for number, states in self.steps:
            self._extend(cost, number, states, stages[number], joined)
        return cost

    def ends(self, cost: FloatArray, joined: Joined) -> FloatArray:
        """Of whole pipelines, by [state, host of the last]."""
        return np.where(self.lacking[:, None], inf, cost[:, :, -1] + joined.exit)

    def cheapest(
        self, cost: FloatArray, stages: Sequence[FloatArray], joined: Joined
    ) -> tuple[float, list[Placed]] | None:
        ends = self.ends(cost, joined)
        if not np.isfinite(ends.min()):
            return None
        state, host = divmod(int(ends.argmin()), self.num_hosts)
        return float(ends[state, host]), self._trace(cost, stages, joined, state, host)

    def _extend(
        self, cost: FloatArray, number: int, states: IntArray, stage: FloatArray, joined: Joined
    ) -> None:
        most = stage.shape[1]
        before = (cost[states] + joined.hop[:, number, None]).min(axis=1)
        alive = np.isfinite(before[:, :-1].min(axis=1))
        if most == 0 or not alive.any():
            return
        states, before = states[alive], before[alive]
        padded = np.concatenate([np.full((len(states), most), inf), before], axis=1)
        # [j, state, stop] = before[state, stop − (most − j)]: numpy is fastest over the first axis.
        shifted = np.moveaxis(sliding_window_view(padded, before.shape[1], axis=1)[:, :most], 1, 0)
        after = (shifted + stage.T[::-1, None, :]).min(axis=0)
        states, host = states + self.added[number], self.host_of[number]
        cost[states, host] = np.minimum(cost[states, host], after)

    def _trace(
        self, cost: FloatArray, stages: Sequence[FloatArray], joined: Joined, state: int, host: int
    ) -> list[Placed]:
        placed: list[Placed] = []
        stop = self.num_layers
        while stop > 0:
            step, state, host = self._last(cost, stages, joined, state, host, stop)
            placed.append(step)
            stop = step.layer_start
        return placed[::-1]

    def _last(
        self,
        cost: FloatArray,
        stages: Sequence[FloatArray],
        joined: Joined,
        state: int,
        host: int,
        stop: int,
    ) -> tuple[Placed, int, int]:
        """The stage that a state's cost ends with, and the state and host before it."""
        target = cost[state, host, stop]
        for number, stage in enumerate(stages):
            before = state - self.added[number]
            if self.host_of[number] != host or before < 0:
                continue
            if (
                before == 0
                and stop <= stage.shape[1]
                and stage[stop, stop - 1] + joined.entry[number] == target
            ):
                return Placed(number, 0, stop), 0, -1
            most = min(stop, stage.shape[1])
            if before == 0 or most == 0 or not self._disjoint(before, number):
                continue
            arriving = cost[before] + joined.hop[:, number, None]
            source = arriving.argmin(axis=0)
            starts = stop - 1 - np.arange(most)
            whole = arriving.min(axis=0)[starts] + stage[stop, :most]
            if whole.min() == target:
                start = int(starts[whole.argmin()])
                return Placed(number, start, stop), before, int(source[start])
        raise AssertionError("a cost is that of one of its steps")

    def _disjoint(self, before: int, number: int) -> bool:
        return any(n == number and bool((states == before).any()) for n, states in self.steps)
