# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportArgumentType=false
# scipy has no type stubs.
"""An upper bound on the tokens/s of all replicas together, without the search and its dynamic programming.

What a set of devices reaches with a share of the sequences is bounded by its ceilings (replicas/ceilings.py), and where
that is not enough by what bounds/bound.py proves of its divisions; HiGHS chooses disjoint sets (scipy.optimize.milp).
Sets that are beyond these numbers are bounded by the prices of their devices and sequences alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import plan_objective_value
from apportion.planner.bounds.bound import bound_of
from apportion.planner.replicas.ceilings import Ceilings
from apportion.planner.replicas.device_sets import DeviceSets
from apportion.planner.replicas.task import Item, RankedWay, ReplicaSets, Task
from apportion.planner.stages.groups import possible_groups
from apportion.types.plan import Certificate, Plan

FloatArray = NDArray[np.float64]

MAX_SETS = 300
"""Of devices: with more, neither the search nor the bound looks at each."""
MAX_EFFORT = 1000
"""Groups of devices in all the bounds of divisions together; after that what is known is enough."""
CLOSE = 1 + 1e-9
"""Relative: tokens/s no further apart are equal."""
CLOSER = 0.995
"""How much further than needed a bound is followed, so that it is not needed again soon."""
SOLVER_TOLERANCE = 1e-6
OPTIMAL = 0
"""Status of scipy.optimize.milp."""
TIME_LIMIT_S = 5.0


def certify_replicas(task: Task, tokens_per_s: float, replicas: Sequence[Plan] = ()) -> Certificate:
    """Of replicas that make so many tokens/s together: no others, however many where none were asked for, make more
    than the bound. What the sets of `replicas` make is where a bound on them need not be lower."""
    sets = DeviceSets(task.cluster, task.constraints)
    if sets.num_sets > MAX_SETS:
        most, method = _of_prices(task, sets), "prices of devices and sequences"
    else:
        bounds = _Bounds(ReplicaSets(task), tokens_per_s, replicas)
        most, method = bounds.most(), "integer program over bounds of all sets of devices (HiGHS)"
    value, lower_bound = 1 / tokens_per_s, 1 / max(most, tokens_per_s)
    return Certificate(
        objective="throughput",
        value=value,
        lower_bound=lower_bound,
        gap=value / lower_bound - 1,
        method=method,
    )


def _of_prices(task: Task, sets: DeviceSets) -> float:
    ceilings = Ceilings(task.problem(task.cluster, 1, task.smallest_chunk), sets)
    devices, sequence = ceilings.of_all(task.most_sequences)
    return float(devices @ np.array(sets.available)) + task.most_sequences * sequence


@dataclass(slots=True)
class _Way:
    """A way of running a set of devices, and the tokens/s that it is known not to exceed."""

    ranked: RankedWay
    most: float
    final: bool = False
    """Nothing less can be proven."""


class _Bounds:
    def __init__(self, of: ReplicaSets, tokens_per_s: float, replicas: Sequence[Plan]) -> None:
        self.of = of
        self._reached = {
            of.first_alike(item): 1 / plan_objective_value(replica)
            for replica in replicas
            if (item := of.item(replica.cluster, replica.workload.concurrency))
        }
        self.aim = tokens_per_s * CLOSE
        self.worth = self._of_ceilings()
        self._ways: dict[Item, list[_Way]] = {}
        self._effort = 0

    def _of_ceilings(self) -> FloatArray:
        """−inf for what cannot be part of anything better, whatever is made of the devices and sequences left over."""
        sets, sequences = self.of.sets, self.of.task.most_sequences
        devices, sequence = self.of.ceilings.of_all(sequences)
        left = (np.array(sets.available) - sets.counts) @ devices
        rest = left[:, None] + sequence * (sequences - np.array(self.of.shares))
        worth = self.of.worth()
        return np.where(worth + rest >= self.aim, worth, -inf)

    def most(self) -> float:
        while True:
            total, chosen = self._best_packing()
            excess = total - self.aim
            if excess <= 0:
                return self.aim
            open_items = [item for item in chosen if not self._closed(item)]
            if not open_items or self._effort >= MAX_EFFORT:
                return total
            for item in open_items:
                self._prove(item, (float(self.worth[item]) - excess) * CLOSER)

    def _of_item(self, item: Item) -> list[_Way]:
        first = self.of.first_alike(item)
        if first not in self._ways:
            self._ways[first] = [_Way(ranked, ranked.most) for ranked in self.of.ranked(first)]
        return self._ways[first]

    def _closed(self, item: Item) -> bool:
        ways = self._of_item(item)
        return not ways or max(ways, key=lambda way: way.most).final

    def _prove(self, item: Item, aim: float) -> None:
        """Brings the bound of every way down to the aim, as far as it goes; stops at one where it does not."""
        first, ways = self.of.first_alike(item), self._of_item(item)
        reached = self._reached.get(first, float(self.worth[item]) * 1e-3)
        for way in ways:
            if way.most <= aim or way.final:
                continue
            problems, enough = self.of.problems(first, way.ranked.way), max(aim, reached)
            least_s = bound_of(problems, way.ranked.way.microbatches, 1 / enough, self.of.kinds).seconds
            self._effort += len(possible_groups(problems[0]))
            way.most = min(way.most, 1 / least_s if least_s > 0 else inf)
            beyond = way.most > enough * CLOSE
            way.final = beyond or aim < reached
            if beyond:
                break
        self.worth[self.of.alike == first.set, item.share] = max((way.most for way in ways), default=-inf)

    def _best_packing(self) -> tuple[float, list[Item]]:
        """What the best choice of disjoint sets is worth at most, and the sets; 0 where there is none."""
        items = [Item(int(one), int(share)) for one, share in np.argwhere(self.worth > 0)]
        if not items:
            return 0.0, []
        worth = np.array([self.worth[item] for item in items])
        result = self._highs(items, worth)
        if result.x is None:
            bound = result.mip_dual_bound if result.status != 2 else 0.0
            return (-float(bound) * self.aim if isfinite(bound) else inf), []
        number = np.round(np.asarray(result.x))
        exact = float(number @ worth)
        proven = -float(result.mip_dual_bound) * self.aim
        chosen = [item for item, count in zip(items, number, strict=True) if count]
        # The solver's figure is rounded to its tolerance: what its choice is worth is added up again.
        close = result.status == OPTIMAL and proven <= exact * (1 + SOLVER_TOLERANCE)
        return (exact if close else proven * (1 + SOLVER_TOLERANCE)), chosen

    def _highs(self, items: list[Item], worth: FloatArray) -> Any:
        from scipy.optimize import Bounds, LinearConstraint, milp

        task, sets = self.of.task, self.of.sets
        counts = np.array([sets.counts[item.set] for item in items])
        shares = np.array([self.of.shares[item.share] for item in items])
        total, available = task.most_sequences, np.array(sets.available)
        rules = [
            LinearConstraint(counts.T, available if task.constraints.use_all else -inf, available),
            LinearConstraint(shares[None, :], total if task.all_sequences else -inf, total),
        ]
        if task.num_replicas is not None:
            rules.append(LinearConstraint(np.ones((1, len(items))), task.num_replicas, task.num_replicas))
        return cast(
            Any,
            milp(
                -worth / self.aim,
                constraints=rules,
                bounds=Bounds(0, (np.array(sets.available) // np.maximum(counts, 1)).max(axis=1)),
                integrality=np.ones(len(items)),
                options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT_S},
            ),
        )
