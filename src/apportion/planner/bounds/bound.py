"""A proven lower bound on the objective of every division with given prefill chunks, whatever its shares.

First whatever the pipeline's order (search/selection.py): groups of each host and their numbers of layers, with a
group's stage in the place where it is cheapest, for every limit on how long a stage is occupied. Where that leaves
a gap, HiGHS solves an integer program over paths (bounds/integer_program.py): from layer 0 to layer L by arcs
(group, layers [a, b), host before), each device used at most once. Arcs that cannot lie on a path as good as the
plan, even if devices could be used again and again, are dropped first.

A group's stage costs what its best shares do where they can be numbered (stages/options.py), else at least its relaxed
times (stages/relaxed.py).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf, isfinite

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import least_steps
from apportion.cost.objective import Goal, Timing, least_goal
from apportion.cost.traffic import coordinator_host
from apportion.planner.bounds.exclusion import Exclusion
from apportion.planner.bounds.integer_program import MAX_ARCS, Arcs, Bound, Network, cheapest_path
from apportion.planner.bounds.ways import Ways, all_ways
from apportion.planner.communication.bound import Proven
from apportion.planner.communication.find import prove_communication
from apportion.planner.problem import Problem, chunk_candidates
from apportion.planner.search.selection import cheapest_selection, num_states
from apportion.planner.search.stage_tables import StageTables
from apportion.planner.stages.formats import group_problems
from apportion.planner.stages.groups import Group, device_axes, first_alike, group_link, possible_groups
from apportion.planner.stages.kinds import StageKinds, kinds_of
from apportion.planner.stages.least_options import exact_options, quick_options
from apportion.planner.stages.options import Options, are_numbered, joined_options
from apportion.planner.stages.share_costs import ShareCosts
from apportion.planner.stages.streamed import group_costs
from apportion.planner.stages.threshold import minimise_over
from apportion.types.plan import Certificate

SLACK = 2e-10
"""Relative: what rounding may add to a cost, and the gap that is not looked into."""
MAX_WAYS = 20_000
"""Of adding a group to a state of its host."""
MANY_GROUPS = 40
"""Different ones, for which a bound with every member's memory takes seconds."""
GOOD_GAP = 9.8e-3
"""With so many, not looked into."""
MANY_GAPS = (1e-3, 3e-3, GOOD_GAP, 0.02, 0.05)
"""With so many, that are tried one after the other before the least there is is looked for."""
GAPS = (SLACK, *(1e-4 * 1.5**step for step in range(23)))
"""That are tried where there are limits."""
SELECTED = "cheapest groups and numbers of layers, in any order"
LIMITED = "cheapest groups and numbers of layers that keep the limits (Lagrangian relaxation)"
RELAXED_GAP = 2e-3
"""With shares that are too many to be numbered, whose relaxation leaves a gap of its own, not looked into."""
PART = 0.05
"""Of a gap, that the bound need not find."""
ANY = 1e9
"""In parts of a gap: the first selection that is found will do."""
ROUGH = 1e-3
"""With so many, how far below the least the bound may be."""
ROUGHLY = 0.1
"""The same of a bound that ways of serving are put in order by."""

Numbers = tuple[int, int]
"""From the first to the second."""
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def certify(problems: Sequence[Problem], value: float) -> Certificate:
    """The certificate of a plan whose objective is `value`: a bound on every plan for any of `problems`, which differ
    in their prefill chunk, number of sequences and coordinator's host alone, that keeps the limits on TTFT and TPOT.
    With limits it is for all numbers of sequences from the least to the most."""
    problem = problems[0]
    least = _least(problems, value)
    lower_bound = min(value, least.seconds)
    return Certificate(
        objective=problem.workload.objective,
        value=value,
        lower_bound=lower_bound,
        gap=value / lower_bound - 1,
        method=least.method,
    )


def _least(problems: Sequence[Problem], value: float) -> Bound | Proven:
    by_host: dict[str, list[Problem]] = {}
    for one in problems:
        by_host.setdefault(coordinator_host(one.cluster), []).append(one)
    if problems[0].workload.objective == "communication":
        proven = (prove_communication(alike[0], value) for alike in by_host.values())
        return min(proven, key=lambda bound: bound.seconds)
    if problems[0].workload.limited:
        return _with_limits(list(by_host.values()), value)
    return _without(list(by_host.values()), value)


def bound_of(problems: Sequence[Problem], microbatches: int, value: float, kinds: StageKinds) -> Bound:
    """On the divisions for one number of microbatches of problems that differ in their coordinator's host, as far as is
    needed to see that none is better than `value`."""
    numbers = (microbatches, microbatches)
    if problems[0].workload.limited:
        one = _at_any(problems)
        number = one.workload.concurrency
        way = Ways(chunks=(one.capacity.chunk_tokens,), sequences=(number, number), microbatches=numbers)
        if Exclusion(one).excludes(way, value * (1 - SLACK)):
            return Bound(value * (1 - SLACK), LIMITED)
    return _of_numbers(problems, numbers, value, kinds, 0.0, 0.0)


def rough_bound(problem: Problem, microbatches: Numbers, kinds: StageKinds) -> float:
    """On the divisions for these numbers of microbatches, quickly and to a few percent; infinite for none."""
    return _Bounds(problem, microbatches, kinds, inf).rough().seconds


def none_below(problem: Problem, microbatches: Numbers, value: float, kinds: StageKinds) -> bool:
    """Whether it is quick to see that no division for these numbers of microbatches is below `value`."""
    return _Bounds(problem, microbatches, kinds, value).none_below()


def all_numbers(problem: Problem) -> tuple[Numbers, ...]:
    """Of microbatches, in parts to begin with: 1, 2, 3 to 4, 5 to 8, …; latency is of one request alone, and does not
    depend on it."""
    if problem.workload.objective == "latency":
        return ((1, 1),)
    number = problem.workload.concurrency
    chunks = (problem.capacity.chunk_tokens,)
    _, most = all_ways(chunks, (number, number), len(problem.cluster.devices)).microbatches
    doubled = [(2**power // 2 + 1, min(2**power, most)) for power in range((most - 1).bit_length() + 1)]
    return tuple(doubled)


def halves(microbatches: Numbers) -> tuple[Numbers, Numbers]:
    few, many = microbatches
    middle = (few + many) // 2
    return (few, middle), (middle + 1, many)


def _at_any(problems: Sequence[Problem]) -> Problem:
    """One that no division of these problems is better than in: they differ in their coordinator's host."""
    return replace(problems[0], any_coordinator=len(problems) > 1)


def _of_numbers(
    problems: Sequence[Problem],
    microbatches: Numbers,
    value: float,
    kinds: StageKinds,
    relaxed_gap: float,
    part: float,
) -> Bound:
    """With all numbers and the coordinator on any host at once where that is good enough, else with one after the
    other."""
    few, many = microbatches
    if few < many or len(problems) > 1:
        bound = _Bounds(_at_any(problems), microbatches, kinds, value).good_quick(relaxed_gap, part)
        if bound is not None:
            return bound
    if few < many:
        bounds = [
            _of_numbers(problems, numbers, value, kinds, relaxed_gap, part)
            for numbers in halves(microbatches)
        ]
    else:
        bounds = [_Bounds(one, microbatches, kinds, value).best(relaxed_gap, part) for one in problems]
    return min(bounds, key=lambda bound: bound.seconds)


def _without(by_host: Sequence[Sequence[Problem]], value: float) -> Bound:
    """Of the same problems with the coordinator on each host."""
    kinds = kinds_of(by_host[0][0].model)
    bounds = (
        _of_numbers(alike, numbers, value, kinds, RELAXED_GAP, PART)
        for alike in zip(*by_host, strict=True)
        for numbers in all_numbers(alike[0])
    )
    return min(bounds, key=lambda bound: bound.seconds)


def _with_limits(by_host: Sequence[Sequence[Problem]], value: float) -> Bound:
    problems = by_host[0]
    problem = problems[0]
    numbers = [one.workload.concurrency for one in problems]
    least, most = min(numbers), max(numbers)
    chunks = tuple(sorted({one.capacity.chunk_tokens for one in problems}, reverse=True))
    if least < most:  # which are chosen among depends on the number
        chunks = chunk_candidates(problem.workload.max_context_tokens)
    ways = all_ways(chunks, (least, most), len(problem.cluster.devices))
    of_hosts = [alike[0] for alike in by_host]
    gap = Exclusion(_at_any(of_hosts)).best_proven(ways, value, GAPS)
    if gap > SLACK and len(of_hosts) > 1:
        gap = min(gap, max(Exclusion(one).best_proven(ways, value, GAPS) for one in of_hosts))
    return Bound(value * (1 - gap), LIMITED) if gap < 1 else _without(by_host, value)


@dataclass(frozen=True, slots=True)
class Selected:
    """A cheapest selection within a limit; nothing is known of its maximum but that."""

    total: float
    maximum: float
    num_stages: int


class _Bounds:
    """Bounds for numbers of microbatches."""

    def __init__(
        self,
        problem: Problem,
        microbatches: Numbers,
        kinds: StageKinds,
        value: float,
    ) -> None:
        self.problem = problem
        groups = possible_groups(problem)
        workload, chunk_tokens = problem.workload, problem.capacity.chunk_tokens
        self.goal: Goal = least_goal(workload, chunk_tokens, microbatches)
        self.groups = groups
        self.kinds = kinds
        self.value = value
        self.steps = least_steps(workload, chunk_tokens, microbatches)
        self.alike = first_alike(problem, groups)
        self.costs = {number: self._costs(groups[number]) for number in dict.fromkeys(self.alike)}

    def _costs(self, group: Group) -> list[ShareCosts]:
        """In each weight format that may be best."""
        link = group_link(self.problem, group)
        problems = group_problems(self.problem, group.devices, self.kinds)
        return [group_costs(one, group.devices, link, self.steps, self.kinds) for one in problems]

    def best(self, relaxed_gap: float = 0.0, part: float = 0.0) -> Bound:
        """The quick bound where it is good enough; else with every member's memory, then by integer program. With
        relaxed shares this gap is good enough; this part of any gap need not be found."""
        quick, is_good = self._quick(relaxed_gap, part)
        if is_good:
            return quick
        fair, tables = self._fair_gap(relaxed_gap), self._tables(exact_options)
        bound, is_path = self._of_selections(tables, part, self.tolerance)
        bound = max(quick, bound, key=lambda bound: bound.seconds)
        if self._good(bound, fair) or is_path:
            return bound
        return max(bound, self._of_paths(tables), key=lambda b: b.seconds)

    def good_quick(self, relaxed_gap: float, part: float) -> Bound | None:
        """The quick bound where it is good enough."""
        quick, is_good = self._quick(relaxed_gap, part)
        return quick if is_good else None

    def _quick(self, relaxed_gap: float, part: float) -> tuple[Bound, bool]:
        """With whether it is good enough."""
        tables = self._tables(quick_options)
        if self.goal.objective == "latency":
            sums = self._of_sums(tables)
            if self._good(sums, self._fair_gap(relaxed_gap)):
                return sums, True
        found, _ = self._of_selections(tables, part, self.tolerance)
        return found, self._good(found, self._good_gap)

    @property
    def tolerance(self) -> float:
        return ROUGH if len(self.costs) > MANY_GROUPS else SLACK

    @property
    def _good_gap(self) -> float:
        return GOOD_GAP if len(self.costs) > MANY_GROUPS else 3 * SLACK

    def _fair_gap(self, relaxed_gap: float) -> float:
        relaxed = any(not are_numbered(costs) for by_format in self.costs.values() for costs in by_format)
        return max(self._good_gap, relaxed_gap) if relaxed else self._good_gap

    def rough(self) -> Bound:
        """With members' memory in sum, in any order, and a tenth less than the best such bound at most."""
        tables = self._tables(quick_options)
        if self.goal.objective == "latency":
            return self._of_sums(tables)
        return self._of_selections(tables, 0.0, ROUGHLY)[0]

    def none_below(self) -> bool:
        """Whether the quick bound reaches the value; ends at the first selection that is below it."""
        tables = self._tables(quick_options)
        if self.goal.objective == "latency" and self._good(self._of_sums(tables), 3 * SLACK):
            return True
        return self._is_few and self._selected(tables, self.value * (1 - SLACK), SLACK, ANY) is None

    def _good(self, bound: Bound, gap: float) -> bool:
        return bound.seconds >= self.value * (1 - gap)

    def _tables(self, options: Callable[[ShareCosts, Goal], Options]) -> StageTables:
        found = {
            number: joined_options([options(costs, self.goal) for costs in by_format])
            for number, by_format in self.costs.items()
        }
        by_group = [found[number] for number in self.alike]
        return StageTables(self.problem, self.goal, self.steps, self.groups, self.kinds, by_group)

    def _of_paths(self, tables: StageTables) -> Bound:
        arcs = _drop_hopeless(tables, self.goal, _arcs(tables, self.goal), self.value)
        if len(arcs) == 0:
            return Bound(self.value, "no other path can be as good, even reusing devices")
        if len(arcs) > MAX_ARCS:
            return Bound(0.0, "too many arcs")
        axes = tables.axes
        counts = np.array([axes.used(group.counts) for group in self.groups])[arcs.group]
        network = Network(
            self.problem.model.num_layers,
            len(tables.hosts),
            counts,
            np.array(axes.available),
            np.array(axes.least),
        )
        return cheapest_path(network, self.goal, arcs, self.value)

    def _of_sums(self, tables: StageTables) -> Bound:
        """Under latency, in one go: the most occupied is occupied for no less than any mean of the stages, here by
        their parts of the layers. Good where a single stage is best."""
        if not self._is_few:
            return Bound(0.0, "too many groups on one host")
        parts = (self.kinds.num_layers / self.problem.model.num_layers)[:, None]
        by_kind = {
            id(options): (
                options.path_s + parts * np.where(np.isfinite(options.path_s), options.occupied_s, 0)
            ).min(axis=1)
            for options in tables.options
        }
        hosts = tables.choices(
            [by_kind[id(options)] for options in tables.options], partial(tables.within, inf)
        )
        found = cheapest_selection(hosts, self.problem.model.num_layers, self.problem.max_devices)
        seconds = inf if found is None else found[0]
        return Bound(min(seconds, self.value) * (1 - SLACK), SELECTED)

    def _of_selections(self, tables: StageTables, part: float, tolerance: float) -> tuple[Bound, bool]:
        """With whether the selection that is the least is a single stage, so a path that could be taken."""
        if not self._is_few:
            return Bound(0.0, "too many groups on one host"), False
        cutoff = self.value * (1 - SLACK)
        for gap in MANY_GAPS if len(self.costs) > MANY_GROUPS and isfinite(self.value) else ():
            below = self.value * (1 - gap)
            if self._selected(tables, below, tolerance, ANY) is None:
                return Bound(below * (1 - tolerance), SELECTED), False
        found = self._selected(tables, cutoff, tolerance, part)
        seconds = cutoff if found is None else self.goal.combine(found.total, found.maximum)
        if isfinite(seconds):
            seconds -= tolerance * seconds + (part * (cutoff - seconds) if part else 0.0)
        single = found is not None and found.num_stages == 1
        return Bound(seconds, SELECTED), single

    @cached_property
    def _is_few(self) -> bool:
        """Whether there are not too many ways to use the devices of all hosts, each by itself."""
        axes = device_axes(self.problem)
        num_groups = Counter(group.host for group in self.groups)
        states = {
            host: num_states(
                [n for n, where in zip(axes.available, axes.hosts, strict=True) if where == host]
            )
            for host in num_groups
        }
        return sum(states[host] * num for host, num in num_groups.items()) <= MAX_WAYS

    def _selected(self, tables: StageTables, cutoff: float, tolerance: float, part: float) -> Selected | None:
        """The least below `cutoff`, as `minimise_over` finds it."""
        layers = self.problem.model.num_layers

        def solve(limit: float) -> Selected | None:
            found = cheapest_selection(tables.host_choices(limit), layers, self.problem.max_devices)
            return None if found is None else Selected(found[0], limit, len(found[1]))

        return minimise_over(solve, self.goal.combine, tables.maxima(), cutoff, tolerance, part)


def _arcs(tables: StageTables, goal: Goal) -> Arcs:
    parts: list[Arcs] = []
    joins, hosts = tables.joins, tables.hosts
    num_layers = len(tables.kinds.index) - 1
    for number, (group, options) in enumerate(zip(tables.groups, tables.options, strict=True)):
        least = np.where(np.isfinite(options.path_s), options.occupied_s, inf).min(axis=1)
        path_s = np.append(options.path_s.min(axis=1), inf)[tables.kinds.index]
        occupied_s = np.append(least, inf)[tables.kinds.index]
        path_s = tables.places.of_ranges(number, path_s)
        for src, host in enumerate(hosts):
            before = [joins.entry(group.host, group.size) if host == joins.home else None]
            before += [joins.hop(host, group.host, group.size)] * (num_layers - 1)
            after = [Timing(prefill_s=0.0, decode_s=0.0)] * num_layers
            after[-1] = joins.exit(group.host) or Timing(prefill_s=inf, decode_s=inf)
            parts.append(
                _group_arcs(goal, number, src, hosts.index(group.host), path_s, occupied_s, before, after)
            )
    fields = ("group", "src_host", "dst_host", "start", "stop", "path_s", "occupied_s")
    return Arcs(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def _group_arcs(
    goal: Goal,
    group: int,
    src: int,
    dst: int,
    stage_path_s: FloatArray,
    stage_occupied_s: FloatArray,
    before: Sequence[Timing | None],
    after: Sequence[Timing],
) -> Arcs:
    """Arcs of one group from one host: `before` is the link into a stage by its start, `after` out of it by stop."""
    joined = np.array([inf if link is None else goal.path_s(link) for link in before])
    left = np.array([goal.path_s(link) if isfinite(link.decode_s) else inf for link in after])
    path_s = stage_path_s[:-1, 1:] + joined[:, None] + left[None, :]
    start, stop = np.nonzero(np.isfinite(path_s))
    into_s = np.array([0.0 if link is None else goal.occupied_s(link) for link in before])
    out_s = np.array([goal.occupied_s(link) if isfinite(link.decode_s) else 0.0 for link in after])
    occupied_s = np.maximum(stage_occupied_s[:-1, 1:], np.maximum(into_s[:, None], out_s[None, :]))
    return Arcs(
        np.full(len(start), group),
        np.full(len(start), src),
        np.full(len(start), dst),
        start,
        stop + 1,
        path_s[start, stop],
        occupied_s[start, stop],
    )


def _drop_hopeless(tables: StageTables, goal: Goal, arcs: Arcs, value: float) -> Arcs:
    """Keeps the arcs that may lie on a path of at most `value`, by shortest paths that may reuse devices."""
    layers, hosts = len(tables.kinds.index) - 1, len(tables.hosts)
    forth = np.full((layers + 1, hosts), inf)
    forth[0] = 0.0
    for stop in range(1, layers + 1):
        ending = arcs.stop == stop
        costs = forth[arcs.start[ending], arcs.src_host[ending]] + arcs.path_s[ending]
        np.minimum.at(forth[stop], arcs.dst_host[ending], costs)
    back = np.full((layers + 1, hosts), inf)
    back[layers] = 0.0
    for start in reversed(range(layers)):
        starting = arcs.start == start
        costs = back[arcs.stop[starting], arcs.dst_host[starting]] + arcs.path_s[starting]
        np.minimum.at(back[start], arcs.src_host[starting], costs)
    through = forth[arcs.start, arcs.src_host] + arcs.path_s + back[arcs.stop, arcs.dst_host]
    limit = value * goal.per * (1 + SLACK)
    if goal.objective == "latency":
        return arcs.keep(through + arcs.occupied_s <= limit)
    return arcs.keep((through <= limit) & (arcs.occupied_s <= limit))
