"""A proven lower bound on the objective, by a method that shares nothing with the search but the cost model.

Divisions are paths from layer 0 to layer L whose arcs are (group, layers [a, b), host before). Arcs cost at
least their relaxed times (relaxed.py). Arcs that cannot lie on a path as good as the plan, even if devices
could be used again and again, are dropped; over the rest HiGHS solves the integer program that uses each device
at most once. Too large for that, its LP relaxation is solved: weaker, still sound.
"""

from collections.abc import Sequence
from math import inf, isfinite

import numpy as np
from numpy.typing import NDArray

from apportion.cost.objective import Goal, Timing
from apportion.cost.traffic import host_link
from apportion.planner.integer_program import Arcs, Bound, Network, cheapest_path
from apportion.planner.joins import Joins
from apportion.planner.problem import Problem, microbatch_candidates
from apportion.planner.relaxed import RelaxedGroup
from apportion.planner.search import Group, StageKinds, device_kinds, possible_groups
from apportion.types.plan import Certificate

SLACK = 1e-9
"""Relative: what rounding may add to a path's cost."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def certify(problem: Problem, value: float) -> Certificate:
    """The certificate of a plan whose objective is `value`: a bound on every plan with the same prefill chunk."""
    bounds = [
        _bound(problem, microbatches, value)
        for microbatches in microbatch_candidates(problem.workload, len(problem.cluster.devices))
    ]
    least = min(bounds, key=lambda bound: bound.seconds)
    lower_bound = min(value, least.seconds)
    return Certificate(
        objective=problem.workload.objective,
        value=value,
        lower_bound=lower_bound,
        gap=value / lower_bound - 1,
        method=least.method,
    )


def _bound(problem: Problem, microbatches: int, value: float) -> Bound:
    goal = problem.goal(microbatches)
    groups = possible_groups(problem)
    arcs = _drop_hopeless(problem, goal, _arcs(problem, goal, microbatches, groups), value)
    if len(arcs) == 0:
        return Bound(value, "no other path can be as good, even reusing devices")
    counts = np.array([group.counts for group in groups])[arcs.group]
    available = np.array([len(kind) for kind in device_kinds(problem.cluster.devices)])
    network = Network(problem.model.num_layers, len(_hosts(problem)), counts, available)
    return cheapest_path(network, goal, arcs, value)


def _hosts(problem: Problem) -> list[str]:
    return list(dict.fromkeys(device.host for device in problem.cluster.devices))


def _arcs(problem: Problem, goal: Goal, microbatches: int, groups: Sequence[Group]) -> Arcs:
    steps = problem.steps(microbatches)
    joins = Joins(problem, steps)
    kinds = StageKinds(problem.model)
    hosts = _hosts(problem)
    parts: list[Arcs] = []
    for number, group in enumerate(groups):
        link = host_link(problem.cluster, group.host, group.host)
        relaxed = RelaxedGroup(problem, group.devices, link, steps)
        path_s, occupied_s = _matrices(kinds, [relaxed.least(kind, goal) for kind in kinds.kinds])
        for src, host in enumerate(hosts):
            before = [joins.entry(group.host, group.size) if host == joins.home else None]
            before += [joins.hop(host, group.host, group.size)] * (problem.model.num_layers - 1)
            after = [Timing(prefill_s=0.0, decode_s=0.0)] * problem.model.num_layers
            after[-1] = joins.exit(group.host) or Timing(prefill_s=inf, decode_s=inf)
            parts.append(
                _group_arcs(goal, number, src, hosts.index(group.host), path_s, occupied_s, before, after)
            )
    fields = ("group", "src_host", "dst_host", "start", "stop", "path_s", "occupied_s")
    return Arcs(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def _matrices(kinds: StageKinds, least: Sequence[tuple[float, float]]) -> tuple[FloatArray, FloatArray]:
    """Path and occupied seconds of the stage [start, stop), infinite where it does not fit."""
    by_kind = np.array([*least, (inf, inf)])
    return by_kind[kinds.index, 0], by_kind[kinds.index, 1]


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


def _drop_hopeless(problem: Problem, goal: Goal, arcs: Arcs, value: float) -> Arcs:
    """Keeps the arcs that may lie on a path of at most `value`, by shortest paths that may reuse devices."""
    layers, hosts = problem.model.num_layers, len(_hosts(problem))
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
