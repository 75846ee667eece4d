# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportArgumentType=false
# scipy has no type stubs.
"""The cheapest path that uses each device at most once, as an integer program for HiGHS (scipy.optimize.milp).

Cost is the path's sum and the most occupied arc together, as the goal combines them. Where the program is too
large its LP relaxation is solved, and where time runs out HiGHS's dual bound is taken: weaker, still sound.
scipy is imported where it is called: that takes longer than most plans.
"""

from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from apportion.cost.objective import Goal

MAX_INTEGER_ARCS = 6000
MAX_ARCS = 60_000
TIME_LIMIT_S = 5.0
SOLVER_TOLERANCE = 1e-6
OPTIMAL, INFEASIBLE = 0, 2
"""Statuses of scipy.optimize.milp."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Network:
    """Nodes are (layer, host); `used[arc, kind]` devices of `available[kind]`, of which `least[kind]` take part."""

    num_layers: int
    num_hosts: int
    used: IntArray
    available: IntArray
    least: IntArray


@dataclass(frozen=True, slots=True)
class Arcs:
    """One entry per arc."""

    group: IntArray
    src_host: IntArray
    dst_host: IntArray
    start: IntArray
    stop: IntArray
    path_s: FloatArray
    occupied_s: FloatArray

    def __len__(self) -> int:
        return len(self.group)

    def keep(self, mask: NDArray[np.bool_]) -> "Arcs":
        return Arcs(
            self.group[mask],
            self.src_host[mask],
            self.dst_host[mask],
            self.start[mask],
            self.stop[mask],
            self.path_s[mask],
            self.occupied_s[mask],
        )


@dataclass(frozen=True, slots=True)
class Bound:
    seconds: float
    method: str


def cheapest_path(network: Network, goal: Goal, arcs: Arcs, value: float) -> Bound:
    """A bound on the objective of every path over these arcs; `value` is that of one plan, for scale."""
    if len(arcs) > MAX_INTEGER_ARCS:
        return _relaxed(network, goal, arcs, value, f"LP relaxation over {len(arcs)} arcs (HiGHS)")
    name = f"integer program over {len(arcs)} arcs (HiGHS)"
    result = _highs(network, goal, arcs, value, integer=True)
    if result.status == INFEASIBLE:
        return Bound(value, "no path of as little cost uses each device at most once (HiGHS)")
    proven = _finite(result.mip_dual_bound)
    if result.status == OPTIMAL and result.x is not None:
        # The solver's own figure is rounded to its tolerance: its path's cost is added up again.
        chosen = np.asarray(result.x)[:-1] > 0.5
        exact = goal.combine(float(arcs.path_s[chosen].sum()), float(arcs.occupied_s[chosen].max()))
        if exact <= value * proven * (1 + SOLVER_TOLERANCE):
            return Bound(exact, name)
    stopped = f"{name}, stopped after {TIME_LIMIT_S:.0f} s"
    relaxed = _relaxed(network, goal, arcs, value, f"{stopped}, and its LP relaxation")
    return Bound(max(proven * (1 - SOLVER_TOLERANCE) * value, relaxed.seconds), relaxed.method)


def _relaxed(network: Network, goal: Goal, arcs: Arcs, value: float, method: str) -> Bound:
    result = _highs(network, goal, arcs, value, integer=False)
    if result.status == INFEASIBLE:
        return Bound(value, "no path of as little cost uses each device at most once (HiGHS)")
    proven = _finite(result.fun) * (1 - SOLVER_TOLERANCE) if result.status == OPTIMAL else 0.0
    return Bound(max(proven * value, _weakest(arcs, goal)), method)


def _finite(bound: float | None) -> float:
    return float(bound) if bound is not None and isfinite(bound) else 0.0


def _highs(network: Network, goal: Goal, arcs: Arcs, value: float, *, integer: bool) -> Any:
    """HiGHS's result, in units of `value`; the last variable is the most occupied arc, or the whole."""
    from scipy.optimize import Bounds, milp

    scale = value * goal.per
    latency = goal.objective == "latency"
    objective = np.append(arcs.path_s / scale if latency else np.zeros(len(arcs)), 1.0)
    return cast(
        Any,
        milp(
            objective,
            constraints=_constraints(network, arcs, scale, latency),
            bounds=Bounds(0, np.append(np.ones(len(arcs)), inf)),
            integrality=np.append(np.full(len(arcs), int(integer)), 0),
            options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT_S},
        ),
    )


def _weakest(arcs: Arcs, goal: Goal) -> float:
    """Every path has an arc that leaves layer 0."""
    first = arcs.start == 0
    return goal.combine(float(arcs.path_s[first].min()), float(arcs.occupied_s[first].min()))


def _constraints(network: Network, arcs: Arcs, scale: float, latency: bool) -> list[Any]:
    """Last column: the most occupied stage or link (latency), the whole (throughput)."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import coo_array, vstack

    layers, hosts = network.num_layers, network.num_hosts
    columns = np.arange(len(arcs))
    ones = np.ones(len(arcs))
    # One start, one end, and in every node between them as many arcs in as out.
    leave = _rows(
        arcs.start * hosts + np.where(arcs.start == 0, 0, arcs.src_host), columns, ones, layers, hosts
    )
    reach = _rows(
        arcs.stop * hosts + np.where(arcs.stop == layers, 0, arcs.dst_host), columns, ones, layers, hosts
    )
    balance = np.zeros((layers + 1) * hosts)
    balance[0], balance[layers * hosts] = 1, -1
    used = coo_array(np.hstack([network.used.T, np.zeros((len(network.available), 1))]))
    covering = [
        np.where((arcs.start <= layer) & (layer < arcs.stop), arcs.occupied_s, 0) for layer in range(layers)
    ]
    maxima = covering if latency else [*covering, arcs.path_s]
    above = coo_array(np.hstack([np.array(maxima) / scale, np.full((len(maxima), 1), -1.0)]))
    return [
        LinearConstraint(leave - reach, balance, balance),
        LinearConstraint(
            vstack([used, above]),
            np.append(network.least, np.full(len(maxima), -inf)),
            np.append(network.available, np.zeros(len(maxima))),
        ),
    ]


def _rows(rows: IntArray, columns: IntArray, values: FloatArray, layers: int, hosts: int) -> Any:
    """A sparse matrix with a row per node and a last, empty column."""
    from scipy.sparse import coo_array

    return coo_array((values, (rows, columns)), shape=((layers + 1) * hosts, len(columns) + 1)).tocsr()
