"""The least path cost of choosing groups and how many layers each gets, whatever the order of the pipeline.

Hosts are taken one by one and added up: in each, how many devices of each kind are used, whether a stage was
entered from another host, whether the first and the last stage are among them. Every host in use is entered at
least once over its cheapest link from another, but for the host of the first stage (it too, where it has the last
stage and is not the only host); all other hops cost at least the cheapest there is. So no division costs less, and
where links between hosts are alike, one costs the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

MIDDLE, FIRST, LAST, ONLY = range(4)
"""Positions, as sets of {first, last}."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One group of a host: which of its devices, and what it costs."""

    group: int
    counts: tuple[int, ...]
    """Of the host's kinds of devices."""
    path_s: FloatArray
    """[position, layers], links to the coordinator included."""
    hop_s: float
    """The cheapest from anywhere."""
    cross_s: float
    """The cheapest from another host."""


@dataclass(frozen=True, slots=True)
class HostChoices:
    kind_counts: tuple[int, ...]
    least_used: tuple[int, ...]
    """Of each kind, that have to take part."""
    choices: tuple[Choice, ...]

    @property
    def key(self) -> object:
        """Equal where two hosts have the same table."""
        costs = tuple((c.counts, c.path_s.tobytes(), c.hop_s, c.cross_s) for c in self.choices)
        return (self.kind_counts, self.least_used, costs)

    @property
    def needed(self) -> bool:
        return any(self.least_used)


class Taken(NamedTuple):
    group: int
    position: int
    num_layers: int
    crossed: bool = False
    """Entered over the cheapest link from another host, not the cheapest of all."""


@dataclass(frozen=True, slots=True)
class HostTable:
    """`cost[used, entered, position, layers]`; `best[slot, position, layers]` is the least beside other hosts, of
    state `used, entered`. A slot is a number of devices where that is limited; else there is but one."""

    host: HostChoices
    strides: tuple[int, ...]
    lacking: NDArray[np.bool_]
    """States without a device that has to take part."""
    cost: FloatArray
    best: FloatArray
    state: NDArray[np.int64]


def num_states(kind_counts: Sequence[int]) -> int:
    return int(np.prod([count + 1 for count in kind_counts]))


def cheapest_selection(
    hosts: Sequence[HostChoices], num_layers: int, max_devices: int | None = None
) -> tuple[float, list[Taken]] | None:
    """Of at most `max_devices` devices."""
    tables: dict[object, HostTable] = {}
    by_host: list[HostTable] = []
    for host in hosts:
        key = host.key
        if key not in tables:
            tables[key] = _host_table(host, num_layers, max_devices)
        table = tables[key]
        by_host.append(HostTable(host, table.strides, table.lacking, table.cost, table.best, table.state))
    sums = [np.full((1 if max_devices is None else max_devices + 1, 4, num_layers + 1), inf)]
    sums[0][0, MIDDLE, 0] = 0.0
    for table in by_host:
        sums.append(_added(sums[-1], table.best))
    ends = sums[-1][:, ONLY, num_layers]
    slot = int(ends.argmin())
    ways: list[tuple[float, Callable[[], list[Taken]]]] = [
        (float(ends[slot]), partial(_trace, by_host, sums, num_layers, slot))
    ]
    needed = [table for table in by_host if table.host.needed]
    for table in by_host:
        if any(other is not table for other in needed):
            continue
        states = np.where(table.lacking[:, None], inf, table.cost[:, :, ONLY, num_layers]).reshape(-1)
        state = int(states.argmin())
        ways.append((float(states[state]), partial(_trace_host, table, state, ONLY, num_layers)))
        for choice in table.host.choices:
            if _may_be_alone(table.host, choice, max_devices):
                single = Taken(choice.group, ONLY, num_layers)
                ways.append((float(choice.path_s[ONLY, num_layers]), partial(list[Taken], [single])))
    cost, taken = min(ways, key=lambda way: way[0])
    return None if cost == inf else (cost, taken())


def _may_be_alone(host: HostChoices, choice: Choice, max_devices: int | None) -> bool:
    """Whether one group may hold the whole model."""
    enough = all(count >= least for count, least in zip(choice.counts, host.least_used, strict=True))
    return enough and (max_devices is None or sum(choice.counts) <= max_devices)


def _shifted(cost: FloatArray, most: int) -> FloatArray:
    """`[j, …, layers]` = cost[…, layers − (most − j)], infinite where that is negative.

    The axis that is minimised over comes first: numpy is several times as fast that way.
    """
    padded = np.concatenate([np.full((*cost.shape[:-1], most), inf), cost], axis=-1)
    return np.moveaxis(sliding_window_view(padded, cost.shape[-1], axis=-1)[..., :most, :], -2, 0)


def _added(total: FloatArray, host: FloatArray) -> FloatArray:
    """As `_add`, over [slot, position, layers]."""
    summed = np.full(total.shape, inf)
    for slot, part in enumerate(host):
        if np.isfinite(part).any():
            for before in range(len(total) - slot):
                np.minimum(summed[before + slot], _add(total[before], part), out=summed[before + slot])
    return summed


def _add(total: FloatArray, host: FloatArray) -> FloatArray:
    """The least sums over [position, layers] of two, which do not both hold the first or the last stage."""
    most = total.shape[1] - 1
    summed = np.full(total.shape, inf)
    shifted = _shifted(total, most)
    for position in range(4):
        for other in range(4):
            if position & other or not np.isfinite(host[other]).any():
                continue
            added = (shifted[:, position] + host[other, :0:-1, None]).min(axis=0)
            added = np.minimum(added, total[position] + host[other, 0])
            np.minimum(summed[position | other], added, out=summed[position | other])
    return summed


def _host_table(host: HostChoices, num_layers: int, max_devices: int | None) -> HostTable:
    strides = np.cumprod([1, *(count + 1 for count in host.kind_counts)])
    states_in_all = num_states(host.kind_counts)
    used = np.arange(states_in_all)[:, None] // strides[:-1] % (np.array(host.kind_counts) + 1)
    level = used.sum(axis=1)
    most_devices = sum(host.kind_counts) if max_devices is None else max_devices
    cost = np.full((states_in_all, 2, 4, num_layers + 1), inf)
    cost[0, 0, MIDDLE, 0] = 0.0
    for choice in host.choices:
        most = _most_layers(choice)
        if most == 0:
            continue
        counts = np.array(choice.counts)
        room = (used + counts <= np.array(host.kind_counts)).all(axis=1)
        room &= level + counts.sum() <= most_devices
        added = int(np.dot(strides[:-1], counts))
        # Sets of groups, not sequences; the same group again builds on what its first addition improved.
        repeats = np.min(used[:, counts > 0] // counts[counts > 0], axis=1)
        for repeat in range(int(repeats.max()) + 1):
            states = np.flatnonzero(room & (repeats == repeat))
            states = states[np.isfinite(cost[states]).any(axis=(1, 2, 3))]
            if len(states):
                cost[states + added] = _with_group(cost[states], cost[states + added], choice, most)
    # A host is entered from another, unless it has the first stage and not the last.
    allowed = cost.copy()
    allowed[:, 0, [MIDDLE, LAST, ONLY]] = inf
    lacking: NDArray[np.bool_] = np.any(used < np.array(host.least_used), axis=1)
    slots = [~lacking]
    if max_devices is not None:
        slots = [(level == number) & ~lacking for number in range(max_devices + 1)]
    best = np.full((len(slots), 4, num_layers + 1), inf)
    state = np.zeros(best.shape, dtype=np.int64)
    for slot, inside in enumerate(slots):
        numbers = np.flatnonzero(np.repeat(inside, 2))
        if len(numbers):
            part = allowed.reshape(2 * states_in_all, 4, num_layers + 1)[numbers]
            best[slot], state[slot] = part.min(axis=0), numbers[part.argmin(axis=0)]
    if not host.needed:
        best[0, MIDDLE, 0], state[0, MIDDLE, 0] = 0.0, 0
    return HostTable(host, tuple(int(stride) for stride in strides[:-1]), lacking, cost, best, state)


def _most_layers(choice: Choice) -> int:
    allowed = np.isfinite(choice.path_s[:ONLY]).any(axis=0)
    return int(np.flatnonzero(allowed)[-1]) if allowed.any() else 0


def _with_group(before: FloatArray, after: FloatArray, choice: Choice, most: int) -> FloatArray:
    """The lesser of [state, entered, position, layers] `after` and `before` with one more group."""
    shifted = _shifted(before, most)
    stages = choice.path_s[:, most:0:-1, None, None, None, None]
    middle = (shifted + stages[MIDDLE]).min(axis=0)
    after = np.minimum(after, middle + choice.hop_s)
    np.minimum(after[:, 1], middle[:, 0] + choice.cross_s, out=after[:, 1])
    last = (shifted[:, :, :, :LAST] + stages[LAST]).min(axis=0)
    np.minimum(after[:, :, LAST:], last + choice.hop_s, out=after[:, :, LAST:])
    np.minimum(after[:, 1, LAST:], last[:, 0] + choice.cross_s, out=after[:, 1, LAST:])
    first = (shifted[:, :, :, ::2] + stages[FIRST]).min(axis=0)
    np.minimum(after[:, :, 1::2], first, out=after[:, :, 1::2])
    return after


def _trace(
    tables: Sequence[HostTable], sums: Sequence[FloatArray], num_layers: int, slot: int
) -> list[Taken]:
    position, layers = ONLY, num_layers
    taken: list[Taken] = []
    for table, before in zip(reversed(tables), reversed(sums[:-1]), strict=True):
        ways = [
            (
                float(before[slot - own, position & ~held, layers - count] + table.best[own, held, count]),
                own,
                held,
                count,
            )
            for own in range(slot + 1)
            for held in range(4)
            if held & position == held
            for count in range(layers + 1)
        ]
        _, own, held, count = min(ways)
        if count:
            taken += _trace_host(table, int(table.state[own, held, count]), held, count)
        position, layers, slot = position & ~held, layers - count, slot - own
    return taken


def _trace_host(table: HostTable, state: int, position: int, layers: int) -> list[Taken]:
    """The groups of a state: what is left beside the last one taken is again the cheapest of its kind."""
    state, entered = divmod(state, 2)
    taken: list[Taken] = []
    while state:
        step, state, entered, position, layers = min(
            _steps(table, state, entered, position, layers), key=lambda way: way[0]
        )[1]
        taken.append(step)
    return taken


Before = tuple[Taken, int, int, int, int]
"""A group, and the state, entered, position and layers without it."""


def _steps(
    table: HostTable, state: int, entered: int, position: int, layers: int
) -> list[tuple[float, Before]]:
    ways: list[tuple[float, Before]] = []
    for choice in table.host.choices:
        if any(
            state // stride % (most + 1) < count
            for stride, most, count in zip(table.strides, table.host.kind_counts, choice.counts, strict=True)
        ):
            continue
        before = state - sum(s * c for s, c in zip(table.strides, choice.counts, strict=True))
        most = min(layers, _most_layers(choice))
        for kind in (MIDDLE, FIRST, LAST):
            if kind & position != kind or most == 0:
                continue
            rest = position & ~kind
            hops = [(choice.hop_s, entered, False)]
            if kind == FIRST:
                hops = [(0.0, entered, False)]
            elif entered:
                hops.append((choice.cross_s, 0, True))
            for hop_s, was_entered, crossed in hops:
                left = layers - 1 - np.arange(most)
                sums = choice.path_s[kind, 1 : most + 1] + table.cost[before, was_entered, rest, left] + hop_s
                count = int(sums.argmin()) + 1
                step = Taken(choice.group, kind, count, crossed)
                ways.append((float(sums[count - 1]), (step, before, was_entered, rest, layers - count)))
    return ways
