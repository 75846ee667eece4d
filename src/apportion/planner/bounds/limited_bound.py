"""Whether any division can keep limits on TTFT and TPOT and be as fast as asked: a Lagrangian relaxation.

With p_j for a prompt of n chunks and d_j for a decode microbatch on stage or link j, of which the objective adds up
a·p_j + b·d_j on a path and A·p_j + B·d_j of occupation (cost/objective.py), R sequences in P microbatches keep a time v
per output token of each of o and the limits T on TTFT and U on TPOT where

    Σ (a·p_j + b·d_j) ≤ v·R·o,   Σ d_j ≤ U,   Σ p_j/n + c·max p_j ≤ T,   c = (R+1)/2 − 1/n
    A·p_j + B·d_j ≤ v·R·o and P·d_j ≤ U for every j.

Each j that breaks its own condition is left out. Of the sums, each over its limit, a weighted mean is at most 1 for
every division that keeps them; so where the least of that mean over all groups and numbers of layers, in any order
(search/selection.py), is above 1 for some weights, there is none. The weights are found by cutting planes: each least
is a linear bound on all others. max p_j is taken to lie in an interval, which is halved while that may help.

For several ways of serving at once every figure is the least that it is in one of them: memory and c with the fewest
sequences and the smallest chunk, times with the largest chunk (one that holds others takes no longer than they), the
smallest microbatches and the fewest beside a chunk, a, b, A and B over R·o each by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import workload_steps
from apportion.cost.objective import Serving, Timing, microbatch_sequences
from apportion.planner.bounds.ways import Ways
from apportion.planner.problem import Problem, with_sequences
from apportion.planner.search.selection import FIRST, LAST, Taken, cheapest_selection
from apportion.planner.search.stage_tables import LinkCost, StageTables
from apportion.planner.stages.formats import group_problems
from apportion.planner.stages.groups import Group, first_alike, group_link
from apportion.planner.stages.kinds import StageKinds
from apportion.planner.stages.least_options import exact_options
from apportion.planner.stages.options import PHASES, Options, joined_options
from apportion.planner.stages.streamed import group_costs

MAX_CUTS = 12
MAX_INTERVALS = 16
"""Of the longest prefill of a stage or link."""
ROUNDING = 1 + 2e-9
"""A little more than what a plan's figures may exceed limits by."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Conditions:
    """By row, of (prefill, decode) seconds: the sum over stages and links, and each by itself, is at most 1."""

    sums: FloatArray
    each: FloatArray

    def allowed(self, prefill_s: FloatArray | float, decode_s: FloatArray | float) -> NDArray[np.bool_]:
        rows = [
            of_prefill * prefill_s + of_decode * decode_s <= ROUNDING for of_prefill, of_decode in self.each
        ]
        return np.all(rows, axis=0)


@dataclass(frozen=True, slots=True)
class Least:
    """A selection with the least weighted mean: Σ (prefill, decode), and the longest prefill."""

    mean: float
    totals_s: FloatArray
    longest_s: float


class LimitedBound:
    """Of divisions for the problem served in any of these ways."""

    def __init__(self, problem: Problem, ways: Ways, groups: Sequence[Group], kinds: StageKinds) -> None:
        self.ways, self.kinds, self.groups = ways, kinds, groups
        self.problem = with_sequences(problem, ways.chunks[-1], ways.sequences[0])
        workload = self.problem.workload
        sequences = microbatch_sequences(ways.sequences[0], ways.microbatches[1])
        num_chunks = [-(-workload.prompt_tokens // chunk) for chunk in ways.chunks]
        serving = _every(ways, num_chunks, workload.output_tokens)
        self.steps = workload_steps(
            workload,
            ways.chunks[0],
            sequences,
            beside=int(serving.beside.min()),
            overlapping=ways.microbatches[0] > 1,
        )
        self.chunk_parts = [1 / num for num in num_chunks]
        """Of a prompt, that a chunk is."""
        drawn = serving.sequences * workload.output_tokens
        self.path, self.busy = (
            np.array([(prefill / drawn).min(), (decode / drawn).min()])
            for prefill, decode in (serving.path, serving.occupied)
        )
        """Least weights of (prefill, decode) seconds, per token drawn."""
        alike = first_alike(problem, groups)
        options = {number: self._options(groups[number]) for number in dict.fromkeys(alike)}
        self.times = {id(one): _times(one) for one in options.values()}
        self.tables = StageTables(
            self.problem, PHASES, self.steps, groups, kinds, [options[number] for number in alike]
        )

    def _options(self, group: Group) -> Options:
        """Those that no others beat in both prefill and decode seconds, which stand in place of path and occupied."""
        link = group_link(self.problem, group)
        return joined_options(
            [
                exact_options(group_costs(one, group.devices, link, self.steps, self.kinds), PHASES)
                for one in group_problems(self.problem, group.devices, self.kinds)
            ]
        )

    def excluded(self, seconds: float = inf, max_devices: int | None = None) -> bool:
        """Whether no division of at most so many devices keeps the limits and takes at most `seconds` per output
        token. Of those that one might, not every one is excluded."""
        limit_s = self.problem.workload.ttft_limit_s
        if limit_s is None:
            return self._kept(self._conditions(seconds), max_devices) is None
        part, waiting = min(self.chunk_parts), (self.ways.sequences[0] + 1) / 2 - max(self.chunk_parts)
        intervals = [(0.0, limit_s / (part + waiting))]
        for _ in range(MAX_INTERVALS):
            low, high = intervals.pop()
            spent = low * waiting / limit_s
            if spent < 1:
                first_token = (part / (limit_s * (1 - spent)), 0.0)
                kept = self._kept(self._conditions(seconds, first_token, (1 / high, 0.0)), max_devices)
                if kept is not None:
                    middle = (low + min(kept.longest_s, high)) / 2
                    if kept.totals_s[0] * part + waiting * kept.longest_s <= limit_s or middle <= low:
                        return False
                    intervals += [(low, middle), (middle, high)]
            if not intervals:
                return True
        return False

    def _conditions(
        self, seconds: float, first_token: Sequence[float] = (0.0, 0.0), longest: Sequence[float] = (0.0, 0.0)
    ) -> Conditions:
        few = self.ways.microbatches[0]
        busy, path = self.busy / seconds, self.path / seconds
        token = np.array([0.0, 1 / (self.problem.workload.tpot_limit_s or inf)])
        sums = np.array([row for row in (path, token, np.array(first_token)) if row.any()]).reshape(-1, 2)
        return Conditions(
            sums if len(sums) else np.zeros((1, 2)), np.array([busy, few * token, np.array(longest)])
        )

    def _kept(self, conditions: Conditions, max_devices: int | None) -> Least | None:
        """The last selection that was the least, where no weights show that none keeps the conditions."""
        weights = np.full(len(conditions.sums), 1 / len(conditions.sums))
        cuts: list[FloatArray] = []
        least: Least | None = None
        for _ in range(MAX_CUTS):
            least = self._least(conditions, weights, max_devices)
            if least is None or least.mean > ROUNDING:
                return None
            usage = conditions.sums @ least.totals_s
            cuts.append(usage)
            weights, mean = _best_weights(np.array(cuts))
            if mean <= ROUNDING or (usage <= ROUNDING).all():
                return least
        return least

    def _least(self, conditions: Conditions, weights: FloatArray, max_devices: int | None) -> Least | None:
        prefill, decode = weights @ conditions.sums

        def link_cost(link: Timing | None) -> float:
            if link is None or not conditions.allowed(link.prefill_s, link.decode_s):
                return inf
            return float(prefill * link.prefill_s + decode * link.decode_s)

        costs = {
            key: np.where(
                usable & conditions.allowed(prefill_s, decode_s), prefill * prefill_s + decode * decode_s, inf
            )
            for key, (usable, prefill_s, decode_s) in self.times.items()
        }
        by_kind = {key: cost.min(axis=1) for key, cost in costs.items()}
        hosts = self.tables.choices([by_kind[id(options)] for options in self.tables.options], link_cost)
        found = cheapest_selection(hosts, self.problem.model.num_layers, max_devices)
        if found is None:
            return None
        taken = [
            timing
            for step in found[1]
            for timing in (
                self._stage(step, costs[id(self.tables.options[step.group])]),
                *self._links(step, link_cost),
            )
        ]
        times = np.array([(timing.prefill_s, timing.decode_s) for timing in taken])
        return Least(found[0], times.sum(axis=0), float(times[:, 0].max()))

    def _stage(self, step: Taken, cost: FloatArray) -> Timing:
        kinds, options = self.kinds, self.tables.options[step.group]
        numbers = np.flatnonzero((kinds.position == step.position) & (kinds.num_layers == step.num_layers))
        kind = numbers[self.tables.places.of_kinds(step.group, cost.min(axis=1))[numbers].argmin()]
        option = cost[kind].argmin()
        return Timing(
            prefill_s=float(options.path_s[kind, option]), decode_s=float(options.occupied_s[kind, option])
        )

    def _links(self, step: Taken, link_cost: LinkCost) -> Iterator[Timing]:
        """Into the group, and from the last to the coordinator."""
        group, joins = self.groups[step.group], self.tables.joins
        if step.position & FIRST:
            ways = [joins.entry(group.host, group.size)]
        else:
            hosts = [host for host in self.tables.hosts if host != group.host or not step.crossed]
            ways = [joins.hop(host, group.host, group.size) for host in hosts]
        if step.position & LAST:
            leave = joins.exit(group.host)
            assert leave is not None
            yield leave
        way = min(ways, key=link_cost)
        assert way is not None
        yield way


def _every(ways: Ways, num_chunks: Sequence[int], output_tokens: int) -> Serving:
    """Each of the ways, on three axes."""
    (least, most), (few, many) = ways.sequences, ways.microbatches
    return Serving(
        output_tokens=output_tokens,
        num_chunks=np.array(num_chunks)[:, None, None],
        sequences=np.arange(least, most + 1)[:, None],
        microbatches=np.arange(few, many + 1),
    )


def _times(options: Options) -> tuple[NDArray[np.bool_], FloatArray, FloatArray]:
    """Which options there are, and their seconds, 0 where there is none."""
    usable = np.isfinite(options.path_s)
    decode_s = np.broadcast_to(options.occupied_s, usable.shape)
    return usable, np.where(usable, options.path_s, 0.0), np.where(usable, decode_s, 0.0)


def _best_weights(cuts: FloatArray) -> tuple[FloatArray, float]:
    """The weights, which add up to 1, with the greatest least of `cuts @ weights`: a vertex of that linear program."""
    size = int(cuts.shape[1])
    # Unknown are the weights and the least mean; a vertex has `size` of these rows at zero.
    rows = np.vstack([np.column_stack([cuts, -np.ones(len(cuts))]), np.eye(size, size + 1)])
    chosen = np.array(list(combinations(range(len(rows)), size)), dtype=np.int64)
    total = np.append(np.ones(size), 0.0)
    systems = np.concatenate([rows[chosen], np.broadcast_to(total, (len(chosen), 1, size + 1))], axis=1)
    solvable = np.abs(np.linalg.det(systems)) > 1e-12
    one = np.append(np.zeros(size), 1.0)
    vertices = np.linalg.solve(
        systems[solvable], np.broadcast_to(one, (int(solvable.sum()), size + 1))[..., None]
    )
    weights = np.maximum(vertices[:, :size, 0], 0)
    weights /= weights.sum(axis=1, keepdims=True)
    least = (weights @ cuts.T).min(axis=1)
    best = int(least.argmax())
    return weights[best], float(least[best])
