"""What the stages of every group take of a decode step: seconds in all, and seconds on the group's links.

Members share a stage so that its step is as fast as their memory allows: no stage is slowed down for the sake of
balance. So a stage's two figures follow from its group, kind and weight format. Groups whose shares are too many to be
numbered have the fastest of a pool (stages/options.py); their fastest shares of all are only bounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import communication_steps
from apportion.cost.group_step import group_reductions_s
from apportion.cost.objective import Goal, Timing
from apportion.cost.traffic import LOGIT_BYTES
from apportion.planner.problem import Problem
from apportion.planner.search.joins import Joins
from apportion.planner.search.pipeline import Joined
from apportion.planner.stages.axes import make_shard
from apportion.planner.stages.groups import (
    Group,
    common_formats,
    device_axes,
    first_alike,
    group_link,
)
from apportion.planner.stages.kinds import kinds_of
from apportion.planner.stages.options import Options, numbered_options, pooled_options, share_pool
from apportion.planner.stages.places import Places
from apportion.planner.stages.relaxed import RelaxedGroup
from apportion.planner.stages.share_costs import CostedShares, ShareCosts
from apportion.planner.stages.shares import GroupMemory, GroupShares, StageChoice
from apportion.types.cluster import Link

FloatArray = NDArray[np.float64]

STEP = Goal(
    objective="latency",
    path_prefill=0.0,
    path_decode=1.0,
    occupied_prefill=0.0,
    occupied_decode=0.0,
    per=1.0,
)
"""What a stage adds to the step."""


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Of one group, [weight format, kind], infinite where the stage does not fit."""

    step_s: FloatArray
    links_s: FloatArray
    least_step_s: FloatArray
    """Of the fastest shares of all, at least; less than `step_s` only where the shares came from a pool."""
    most_step_s: FloatArray
    """Likewise at most."""
    least_links_s: FloatArray
    by_format: tuple[tuple[ShareCosts, Options], ...]

    def choice(self, weight_format: int, kind: int) -> StageChoice:
        costs, options = self.by_format[weight_format]
        return options.chosen([costs], kind, inf)


class LinkTables:
    """Of a problem whose workload's objective is communication."""

    def __init__(self, problem: Problem, groups: Sequence[Group]) -> None:
        self.problem = problem
        self.groups = groups
        self.steps = communication_steps(problem.workload)
        self.kinds = kinds_of(problem.model)
        self.axes = device_axes(problem)
        self.places = Places(problem, [group.devices for group in groups], self.kinds)
        self.hosts = list(dict.fromkeys(device.host for device in problem.cluster.devices))
        self.host_of = [self.hosts.index(group.host) for group in groups]
        alike = first_alike(problem, groups)
        found = {number: self._costs(groups[number]) for number in dict.fromkeys(alike)}
        self.costs = [found[number] for number in alike]
        stops = np.arange(problem.model.num_layers + 1)
        starts = stops[:, None] - 1 - np.arange(problem.model.num_layers)
        self._by_stop = np.where(starts >= 0, self.kinds.index[np.maximum(starts, 0), stops[:, None]], -1)

    def joined(self) -> Joined:
        """Seconds of entry, hops and exit."""
        joins = Joins(self.problem, self.steps)

        def seconds(link: Timing | None) -> float:
            return inf if link is None else link.decode_s

        return Joined(
            np.array([seconds(joins.entry(group.host, group.size)) for group in self.groups]),
            np.array(
                [
                    [seconds(joins.hop(src, group.host, group.size)) for group in self.groups]
                    for src in self.hosts
                ]
            ),
            np.array([seconds(joins.exit(host)) for host in self.hosts]),
        )

    def by_stop(self, number: int, by_kind: FloatArray) -> FloatArray:
        """[stop, layers − 1] of a group, no wider than the most layers that have a finite figure."""
        most = int(self.kinds.num_layers[np.isfinite(by_kind)].max(initial=0))
        return self.places.of_stops(number, np.append(by_kind, inf)[self._by_stop[:, :most]])

    def _costs(self, group: Group) -> StageCosts:
        link = group_link(self.problem, group)
        formats = common_formats(self.problem.weight_formats, group.devices)
        parts = [self._in_format(self.problem.in_format(name), group, link) for name in formats]
        step_s, links_s, least_s, most_s, least_links_s = (
            np.array([part[0][column] for part in parts]) for column in range(5)
        )
        return StageCosts(step_s, links_s, least_s, most_s, least_links_s, tuple(part[1] for part in parts))

    def _in_format(
        self, problem: Problem, group: Group, link: Link | None
    ) -> tuple[tuple[FloatArray, ...], tuple[ShareCosts, Options]]:
        """The figures of `StageCosts`, in one format."""
        costs = ShareCosts(problem, group.devices, link, self.steps, self.kinds)
        options = numbered_options(costs, STEP)
        reductions_s = self._reductions_s(problem, group, link)
        if options is not None:
            step_s, links_s = self._chosen(costs, options, reductions_s)
            return (step_s, links_s, step_s, step_s, links_s), (costs, options)
        shares = GroupShares(GroupMemory(problem, group.devices, self.kinds), link, STEP, self.steps)
        options = pooled_options(costs, STEP, share_pool(shares, self.kinds))
        step_s, links_s = self._chosen(costs, options, reductions_s)
        relaxed = RelaxedGroup(problem, group.devices, link, self.steps, self.kinds).apart(STEP)[:, 0]
        least_s, most_s, least_links_s = (np.full(len(step_s), inf) for _ in range(3))
        possible = costs.possible()
        least_s[possible] = np.minimum(relaxed, step_s)[possible]
        most_s[possible] = np.where(np.isfinite(step_s), step_s, self._slowest_s(costs))[possible]
        least_links_s[possible] = reductions_s[possible]
        return (step_s, links_s, least_s, most_s, least_links_s), (costs, options)

    def _slowest_s(self, costs: ShareCosts) -> FloatArray:
        """By kind: no shares take longer than if every phase went to the member that is slowest in it."""
        one = np.eye(len(costs.devices), dtype=np.int64)
        every = costs.costed(self.problem.model.kv_heads * one, costs.num_granules * one)
        alone = CostedShares(
            one[:1],
            one[:1],
            np.array(
                [
                    (
                        costs.attention_s(layer, every.heads).max(axis=0)
                        + costs.ffn_s(layer, every.granules).max(axis=0)
                    )[None]
                    for layer in self.kinds.layers
                ]
            ),
            every.head_s.max(axis=0, keepdims=True),
        )
        return costs.timings(alone, np.arange(len(self.kinds.kinds)))[:, 0, 1]

    def _reductions_s(self, problem: Problem, group: Group, link: Link | None) -> FloatArray:
        """By kind."""
        if link is None or group.size == 1:
            return np.zeros(len(self.kinds.kinds))
        return np.array(
            [
                group_reductions_s(
                    problem.model,
                    make_shard(kind, problem.formats, 0, group.size, 0, 0, 0),
                    link,
                    self.steps.decode,
                )
                for kind in self.kinds.kinds
            ]
        )

    def _chosen(
        self, costs: ShareCosts, options: Options, reductions_s: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """By kind: seconds of the fastest shares, and those on links."""
        step_s = options.path_s.min(axis=1)
        links_s = np.where(np.isfinite(step_s), reductions_s, inf)
        gathering = self.kinds.has_head & np.isfinite(step_s)
        if costs.link is None or len(costs.devices) == 1 or not gathering.any():
            return step_s, links_s
        best = options.path_s[gathering].argmin(axis=1)
        rows = costs.vocabulary_rows(options.granules[options.share[gathering][np.arange(len(best)), best]])
        sizes = rows[:, 1:].max(axis=1) * self.steps.decode.sampled_rows * LOGIT_BYTES
        links_s[gathering] += costs.link.latency_s + sizes / costs.link.bytes_per_s
        return step_s, links_s
