"""The best division within limits on TTFT and TPOT, where the best without them breaks one.

Dynamic programming from layer to layer over (devices used of each kind, host of the last group). What the objective and
both limits need of the stages and links so far are four figures, and all grow with each of them: Σ prefill, Σ decode,
the longest prefill and the most occupied. A state keeps every combination that no other is as good as in all four, but
for those that cannot keep the limits, or beat the best known, with the least that the layers still to come take.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.cost.objective import Timing
from apportion.planner.search.division import Division, PlacedStage, Search
from apportion.planner.stages.groups import Used
from apportion.planner.stages.options import PHASES, Options, joined_options, numbered_options, pooled_options
from apportion.types.workload import Workload

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
State = tuple[Used, str]
PREFILL, DECODE, LONGEST, OCCUPIED = range(4)
MAX_COMBINATIONS = 2000
"""Of a state; beyond, those of the least sums are kept and the result need not be the best."""
ROUNDING = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class Combinations:
    """Figures by row, and where each came from: layer, state and row before, then group and option of its stage."""

    figures: FloatArray
    before: tuple[int, State] | None
    row: IntArray
    group: IntArray
    option: IntArray
    parts: "tuple[Combinations, ...]" = ()
    part: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


class WithinLimits:
    def __init__(self, searched: Search, microbatches: int, cutoff: float) -> None:
        self.searched, self.problem, self.goal = searched, searched.problem, searched.goal
        self.workload: Workload = searched.problem.workload
        self.microbatches = microbatches
        self.cutoff = cutoff
        self.num_layers = self.problem.model.num_layers
        self.num_chunks = len(searched.steps.prefill)
        self.axes = searched.tables.axes
        self.options = [self._options(first) for first in searched.alike]
        self.rest = self._rest()

    def _options(self, first: int) -> Options:
        found: list[Options] = []
        for costs, memory in zip(self.searched.costs[first], self.searched.memories[first], strict=True):
            numbered = numbered_options(costs, PHASES)
            found.append(pooled_options(costs, PHASES, memory.pool) if numbered is None else numbered)
        return joined_options(found)

    def _rest(self) -> FloatArray:
        """[layer, (prefill, decode)]: no stages from that layer to the end take less."""
        rest = np.full((self.num_layers + 1, 2), inf)
        rest[-1] = 0.0
        least = np.min([(o.path_s.min(axis=1), o.occupied_s.min(axis=1)) for o in self.options], axis=0).T
        index = self.searched.stage_kinds.index
        for start in reversed(range(self.num_layers)):
            stops = np.arange(start + 1, self.num_layers + 1)
            rest[start] = (least[index[start, stops]] + rest[stops]).min(axis=0)
        return rest

    def best(self) -> Division | None:
        nothing = (0,) * len(self.axes.available)
        start = (nothing, self.searched.tables.joins.home)
        none = np.zeros(1, dtype=np.int64)
        origin = Combinations(np.zeros((1, 4)), None, none, none, none)
        reached: list[dict[State, list[Combinations]]] = [{} for _ in range(self.num_layers + 1)]
        reached[0][start] = [origin]
        kept: dict[tuple[int, State], Combinations] = {}
        for layer in range(self.num_layers):
            for state, parts in reached[layer].items():
                kept[layer, state] = self._merged(parts, layer)
                for stop, after, added in self._extended(layer, state, kept[layer, state]):
                    reached[stop].setdefault(after, []).append(added)
        ends = [end for state, parts in reached[-1].items() for end in self._ends(state, parts)]
        if not ends:
            return None
        _, combinations, row = min(ends, key=lambda end: end[0])
        return self.searched.joined(list(self._traced(kept, combinations, row))[::-1])

    def _extended(
        self, layer: int, state: State, front: Combinations
    ) -> Iterator[tuple[int, State, Combinations]]:
        used, host = state
        for number, group in enumerate(self.searched.groups):
            after = tuple(a + b for a, b in zip(used, self.axes.used(group.counts), strict=True))
            link = self._link(layer, host, number)
            most = self.problem.max_devices or sum(self.axes.available)
            if (
                link is None
                or sum(after) > most
                or any(a > b for a, b in zip(after, self.axes.available, strict=True))
            ):
                continue
            joined = self._with(front.figures, np.array([[link.prefill_s]]), np.array([[link.decode_s]]))
            ranges = self.searched.tables.places.ranges[number]
            for stop in range(layer + 1, self.num_layers + 1):
                if ranges is not None and not ranges[layer, stop]:
                    continue
                added = self._with_stage(joined, layer, stop, number, state)
                if added is not None:
                    yield stop, (after, group.host), added

    def _link(self, layer: int, host: str, number: int) -> Timing | None:
        group, joins = self.searched.groups[number], self.searched.tables.joins
        link = joins.hop(host, group.host, group.size) if layer else joins.entry(group.host, group.size)
        return None if link is None or self._too_slow(link.decode_s) else link

    def _too_slow(self, decode_s: float) -> bool:
        limit = self.workload.tpot_limit_s
        return limit is not None and self.microbatches * decode_s > limit * ROUNDING

    def _with_stage(
        self, joined: FloatArray, start: int, stop: int, number: int, state: State
    ) -> Combinations | None:
        options = self.options[number]
        kind = int(self.searched.stage_kinds.index[start, stop])
        prefill_s, decode_s = options.path_s[kind], options.occupied_s[kind]
        usable = np.flatnonzero(np.isfinite(prefill_s))
        if self.workload.tpot_limit_s is not None:
            usable = usable[self.microbatches * decode_s[usable] <= self.workload.tpot_limit_s * ROUNDING]
        if len(usable) == 0:
            return None
        figures = self._with(joined, prefill_s[None, usable], decode_s[None, usable])
        row = np.repeat(np.arange(len(joined)), len(usable))
        option = np.tile(usable, len(joined))
        hopeful = self._hopeful(figures, stop)
        if not hopeful.any():
            return None
        return Combinations(
            figures[hopeful],
            (start, state),
            row[hopeful],
            np.full(int(hopeful.sum()), number),
            option[hopeful],
        )

    def _with(self, figures: FloatArray, prefill_s: FloatArray, decode_s: FloatArray) -> FloatArray:
        """Every row of figures with every stage or link."""
        occupied = self.goal.occupied_prefill * prefill_s + self.goal.occupied_decode * decode_s
        columns = (
            figures[:, PREFILL, None] + prefill_s,
            figures[:, DECODE, None] + decode_s,
            np.maximum(figures[:, LONGEST, None], prefill_s),
            np.maximum(figures[:, OCCUPIED, None], occupied),
        )
        return np.stack([np.broadcast_to(c, columns[0].shape).ravel() for c in columns], axis=1)

    def _hopeful(self, figures: FloatArray, layer: int) -> NDArray[np.bool_]:
        """Within the limits and better than the best known, if the rest takes the least it can."""
        prefill = figures[:, PREFILL] + self.rest[layer, 0]
        decode = figures[:, DECODE] + self.rest[layer, 1]
        hopeful = self._values(figures, prefill, decode) < self.cutoff
        ttft, tpot = self.workload.ttft_limit_s, self.workload.tpot_limit_s
        if tpot is not None:
            hopeful &= decode <= tpot * ROUNDING
        if ttft is not None:
            mean_chunks = self.num_chunks * (self.workload.concurrency + 1) / 2
            waiting_s = (mean_chunks - 1) * figures[:, LONGEST]
            hopeful &= (prefill + waiting_s) / self.num_chunks <= ttft * ROUNDING
        return hopeful

    def _values(self, figures: FloatArray, prefill: FloatArray, decode: FloatArray) -> FloatArray:
        path = self.goal.path_prefill * prefill + self.goal.path_decode * decode
        return np.maximum(path, figures[:, OCCUPIED]) / self.goal.per

    def _merged(self, parts: Sequence[Combinations], layer: int) -> Combinations:
        figures = np.concatenate([part.figures for part in parts])
        sums = self._values(figures, *(figures[:, :2] + self.rest[layer]).T)
        rows = _undominated(figures, sums)
        number = np.repeat(np.arange(len(parts)), [len(part.figures) for part in parts])[rows]
        row = np.concatenate([np.arange(len(part.figures)) for part in parts])[rows]
        none = np.empty(0, dtype=np.int64)
        return Combinations(figures[rows], None, row, none, none, tuple(parts), number)

    def _ends(self, state: State, parts: Sequence[Combinations]) -> Iterator[tuple[float, Combinations, int]]:
        leave = self.searched.tables.joins.exit(state[1])
        lacking = any(used < least for used, least in zip(state[0], self.axes.least, strict=True))
        if leave is None or lacking or self._too_slow(leave.decode_s):
            return
        for part in parts:
            figures = self._with(part.figures, np.array([[leave.prefill_s]]), np.array([[leave.decode_s]]))
            values = self._values(figures, figures[:, PREFILL], figures[:, DECODE])
            values = np.where(self._hopeful(figures, self.num_layers), values, inf)
            row = int(values.argmin())
            if values[row] < inf:
                yield float(values[row]), part, row

    def _traced(
        self, kept: dict[tuple[int, State], Combinations], part: Combinations, row: int
    ) -> Iterator[PlacedStage]:
        """Stages from the last to the first."""
        stop = self.num_layers
        while part.before is not None:
            start, state = part.before
            number, option = int(part.group[row]), int(part.option[row])
            kind = int(self.searched.stage_kinds.index[start, stop])
            costs = self.searched.costs[self.searched.alike[number]]
            choice = self.options[number].choice(costs, kind, option)
            yield PlacedStage(self.searched.groups[number], start, stop, choice)
            front, kept_row = kept[start, state], int(part.row[row])
            part, row, stop = front.parts[int(front.part[kept_row])], int(front.row[kept_row]), start


def _undominated(figures: FloatArray, sums: FloatArray) -> IntArray:
    """Rows that no other is as good as in every figure; at most `MAX_COMBINATIONS`, the least sums first."""
    order = np.lexsort((*figures.T, sums))
    kept: list[int] = []
    while len(order) and len(kept) < MAX_COMBINATIONS:
        best = order[0]
        kept.append(int(best))
        order = order[(figures[order] < figures[best]).any(axis=1)]
    return np.array(kept, dtype=np.int64)
