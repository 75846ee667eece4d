"""What a group's stages cost at least: with their best shares where these can be numbered, else with relaxed times."""

from dataclasses import replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import Steps
from apportion.cost.objective import Goal
from apportion.planner.stages.options import (
    Options,
    are_numbered,
    numbered_options,
    one_format,
    optimistic_options,
    remembered,
)
from apportion.planner.stages.relaxed import RelaxedGroup
from apportion.planner.stages.share_costs import ShareCosts

FloatArray = NDArray[np.float64]
STEPS = 32
"""Of relaxed times, between the least path and the least time occupied."""


def exact_options(costs: ShareCosts, goal: Goal) -> Options:
    """With every member's memory."""
    return numbered_options(costs, goal) or remembered(costs, "exact", goal, _exact)


def _exact(costs: ShareCosts, goal: Goal) -> Options:
    relaxed = _relaxed(costs)
    least = np.full((len(costs.kinds.kinds), 2), inf)
    possible = costs.possible()
    least[possible] = relaxed.least(possible, goal)
    return _staircase(costs, goal, relaxed, costs.with_copies(np.maximum(least, relaxed.apart(goal)), goal))


def quick_options(costs: ShareCosts, goal: Goal) -> Options:
    """With members' memory in sum."""
    return remembered(costs, "quick", goal, optimistic_options if are_numbered(costs) else _quick)


def _quick(costs: ShareCosts, goal: Goal) -> Options:
    relaxed = _relaxed(costs)
    return _staircase(costs, goal, relaxed, costs.with_copies(relaxed.apart(goal), goal))


def _staircase(costs: ShareCosts, goal: Goal, relaxed: RelaxedGroup, least: FloatArray) -> Options:
    """Options below all that there are, from the `least` (path, occupied) seconds of each kind and the least sum of
    both: a stage occupied for at least one step's seconds and less than the next one's has a path of at least the
    sum without the latter."""
    path_s, occupied_s = np.full((len(least), STEPS + 1), inf), np.full((len(least), STEPS + 1), inf)
    possible = costs.possible()
    least_path, least_occupied = least[possible].T
    both = replace(
        goal,
        path_prefill=goal.path_prefill + goal.occupied_prefill,
        path_decode=goal.path_decode + goal.occupied_decode,
    )
    sums = costs.with_copies(relaxed.apart(both), both)[possible, 0]
    with np.errstate(invalid="ignore"):  # where no shares fit
        further = np.maximum(sums - least_path - least_occupied, 0.0)
    further[~np.isfinite(least_path)] = 0.0
    steps = np.arange(STEPS + 1) / STEPS
    path_s[possible] = least_path[:, None] + further[:, None] * np.append(1 - steps[1:], 0.0)
    occupied_s[possible] = least_occupied[:, None] + further[:, None] * steps
    none = np.empty((0, len(costs.devices)), dtype=np.int64)
    return Options(path_s, occupied_s, np.full(path_s.shape, -1), none, none, one_format(none))


def _relaxed(costs: ShareCosts) -> RelaxedGroup:
    steps = Steps(prefill=costs.steps[:-1], decode=costs.steps[-1])
    return RelaxedGroup(costs.problem, costs.devices, costs.link, steps, costs.kinds)
