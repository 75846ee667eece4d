"""The search: which devices, grouped how, in which order, with which layers and shares.

Exact by dynamic programming (search/pipeline.py) for every limit on how long a stage or link is occupied, and
stages/threshold.py over the limit. Where there are too many ways to use the devices for that, the groups and their
numbers of layers are chosen first (search/selection.py) and put in order afterwards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import inf
from typing import NamedTuple

from apportion.cost.objective import Goal
from apportion.planner.problem import Problem
from apportion.planner.search.pipeline import Pipelines, Placed
from apportion.planner.search.selection import (
    FIRST,
    LAST,
    MIDDLE,
    ONLY,
    Taken,
    cheapest_selection,
    num_states,
)
from apportion.planner.search.stage_tables import StageTables
from apportion.planner.stages.axes import StageKind
from apportion.planner.stages.groups import (
    Group,
    device_axes,
    device_kinds,
    first_alike,
    group_link,
    possible_groups,
)
from apportion.planner.stages.kinds import StageKinds, stage_kind
from apportion.planner.stages.options import (
    Options,
    joined_options,
    numbered_options,
    pooled_options,
    share_pool,
)
from apportion.planner.stages.share_costs import ShareCosts
from apportion.planner.stages.shares import GroupMemory, GroupShares, StageChoice
from apportion.planner.stages.streamed import group_costs
from apportion.planner.stages.threshold import minimise_over

__all__ = [
    "Division",
    "Group",
    "PlacedStage",
    "Search",
    "StageKinds",
    "device_kinds",
    "possible_groups",
    "stage_kind",
]

MAX_WAYS = 20_000
"""Of adding a group to a state: beyond, a limit takes longer than about half a second."""
CLOSE = 2e-3
"""Relative difference in the objective that a search which is not exact does not follow up."""


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


class Search:
    """All divisions of a problem for one number of microbatches."""

    def __init__(
        self,
        problem: Problem,
        microbatches: int,
        groups: Sequence[Group],
        memories: Sequence[Sequence[GroupMemory]],
        stage_kinds: StageKinds,
    ) -> None:
        self.problem = problem
        self.goal: Goal = problem.goal(microbatches)
        self.steps = problem.steps(microbatches)
        self.groups = groups
        self.memories = memories
        """By group, in each weight format that may be best there."""
        self.stage_kinds = stage_kinds
        self.pooled: set[int] = set()
        """Groups whose shares are too many to be numbered."""
        self.costs: dict[int, list[ShareCosts]] = {}
        """By group and weight format, as the memories."""
        found: dict[int, Options] = {}
        self.alike = first_alike(problem, groups)
        for number in dict.fromkeys(self.alike):
            group, link = groups[number], group_link(problem, groups[number])
            self.costs[number] = [
                group_costs(memory.problem, group.devices, link, self.steps, stage_kinds)
                for memory in memories[number]
            ]
            found[number] = joined_options(
                [
                    self._options(number, costs, memory)
                    for costs, memory in zip(self.costs[number], memories[number], strict=True)
                ]
            )
        self.tables = StageTables(
            problem, self.goal, self.steps, groups, stage_kinds, [found[number] for number in self.alike]
        )

    def _options(self, number: int, costs: ShareCosts, memory: GroupMemory) -> Options:
        options = numbered_options(costs, self.goal)
        if options is None:
            self.pooled.add(number)
            if not memory.pool:
                shares = GroupShares(memory, costs.link, self.goal, self.steps)
                memory.pool = sorted({*share_pool(shares, self.stage_kinds), *costs.further_shares()})
            options = pooled_options(costs, self.goal, memory.pool)
        return options

    @property
    def exact(self) -> bool:
        """Whether all divisions are searched, but for shares that are not among the options."""
        return is_exact(self.problem, self.groups)

    def best(self, cutoff: float = inf) -> Division | None:
        """None where there is none with a value below `cutoff`."""
        if self.pooled:  # whose shares may become better yet
            cutoff *= 1 + CLOSE
        found = self._best_in_order(cutoff) if self.exact else self._best_selected(cutoff)
        return found and self._with_best_shares(found)

    def _best_in_order(self, cutoff: float) -> Division | None:
        pipelines = Pipelines(
            self.groups,
            self.tables.hosts,
            self.tables.axes,
            self.problem.model.num_layers,
            self.problem.max_devices,
        )

        def solve(limit: float) -> Division | None:
            placed = pipelines.solve(self.tables.by_stop(limit), self.tables.joined(limit))
            return None if placed is None else self._division(placed, limit)

        return minimise_over(solve, self.goal.combine, self.tables.maxima(), cutoff)

    def _best_selected(self, cutoff: float) -> Division | None:
        """The best of those divisions that are met while the limit is searched."""
        met: list[Division] = []

        def solve(limit: float) -> Division | None:
            found = cheapest_selection(self.tables.host_choices(limit), self.problem.model.num_layers)
            if found is None:
                return None
            division = self._division(self._in_order(found[1]), limit)
            if division is not None:
                met.append(division)
            return division

        minimise_over(solve, self.goal.combine, self.tables.maxima(), cutoff, CLOSE)
        return min(met, key=self._value, default=None)

    def _value(self, division: Division) -> float:
        return self.goal.combine(division.total, division.maximum)

    def _with_best_shares(self, division: Division) -> Division:
        """Gives stages whose shares came from a pool those with the least cost of that stage."""
        numbers = {group.counts: number for number, group in enumerate(self.groups)}
        for place, stage in enumerate(division.stages):
            first = self.alike[numbers[stage.group.counts]]
            if first not in self.pooled:
                continue
            kind = self.stage_kinds.kinds[int(self.stage_kinds.index[stage.layer_start, stage.layer_stop])]
            link = self.costs[first][0].link
            formats = list(zip(self.memories[first], self.costs[first], strict=True))
            for goal, (memory, costs) in product((self.goal, path_only(self.goal)), formats):
                choice = GroupShares(memory, link, goal, self.steps).choose(kind)
                if choice is not None and self.problem.streaming:
                    choice = self._streaming(costs, kind, choice)
                if choice is not None:
                    stages = list(division.stages)
                    stages[place] = stage._replace(choice=choice)
                    division = min(division, self.joined(stages) or division, key=self._value)
        return division

    def _streaming(self, costs: ShareCosts, kind: StageKind, choice: StageChoice) -> StageChoice | None:
        """The same shares with the time that they take where as few layers are streamed as fit."""
        timing = costs.timing(self.stage_kinds.number(kind), choice.kv_heads, choice.ffn_columns)
        return timing and replace(choice, timing=timing)

    def _division(self, placed: Sequence[Placed], limit: float) -> Division | None:
        """None where a stage in its place, or a link, does not keep within the limit."""
        options, index = self.tables.options, self.stage_kinds.index
        stages: list[PlacedStage] = []
        for number, start, stop in placed:
            kind = int(index[start, stop])
            if options[number].path_within(limit)[kind] == inf:
                return None
            costs = self.costs[self.alike[number]]
            choice = options[number].chosen(costs, kind, limit)
            stages.append(PlacedStage(self.groups[number], start, stop, choice))
        return self.joined(stages)

    def joined(self, stages: Sequence[PlacedStage]) -> Division | None:
        """None where two stages' hosts have no link."""
        groups, joins = [stage.group for stage in stages], self.tables.joins
        links = [
            joins.entry(groups[0].host, groups[0].size),
            *(joins.hop(src.host, dst.host, dst.size) for src, dst in pairwise(groups)),
            joins.exit(groups[-1].host),
        ]
        timings = [stage.choice.timing for stage in stages] + [link for link in links if link is not None]
        if len(timings) < len(stages) + len(links):
            return None
        return Division(
            tuple(stages),
            sum(self.goal.path_s(timing) for timing in timings),
            max(self.goal.occupied_s(timing) for timing in timings),
        )

    def _in_order(self, taken: Sequence[Taken]) -> list[Placed]:
        """The first and the last stage in their places, the others host by host, each next to the nearest."""
        by_position = {step.position: step for step in taken if step.position != MIDDLE}
        if ONLY in by_position:
            return [Placed(by_position[ONLY].group, 0, by_position[ONLY].num_layers)]
        first, last = by_position[FIRST], by_position[LAST]
        middle = [step for step in taken if step.position == MIDDLE]
        hosts = self._host_order([self.groups[step.group].host for step in middle], first, last)
        ordered = sorted(middle, key=lambda step: hosts.index(self.groups[step.group].host))
        return list(_placed([first, *ordered, last]))

    def _host_order(self, hosts: Sequence[str], first: Taken, last: Taken) -> list[str]:
        ordered = [self.groups[first.group].host]
        left = set(hosts) - set(ordered)
        final = self.groups[last.group].host
        while left:
            nearest = min(left, key=lambda host: (host == final, self._hop_s(ordered[-1], host), host))
            ordered.append(nearest)
            left.remove(nearest)
        return ordered

    def _hop_s(self, src: str, dst: str) -> float:
        hop = self.tables.joins.hop(src, dst, 1)
        return inf if hop is None else self.goal.path_s(hop)


def is_exact(problem: Problem, groups: Sequence[Group]) -> bool:
    """Whether all divisions are searched: the ways to use the devices are not too many."""
    return num_states(device_axes(problem).available) * len(groups) <= MAX_WAYS


def path_only(goal: Goal) -> Goal:
    """With the shares of stages weighed by what they add to the sum alone."""
    if goal.objective == "latency":
        return replace(goal, occupied_prefill=0.0, occupied_decode=0.0)
    return replace(goal, occupied_prefill=goal.path_prefill, occupied_decode=goal.path_decode)


def _placed(taken: Sequence[Taken]) -> Iterator[Placed]:
    start = 0
    for step in taken:
        yield Placed(step.group, start, start + step.num_layers)
        start += step.num_layers
