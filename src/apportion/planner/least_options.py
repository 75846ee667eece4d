"""What a group's stages cost at least: with their best shares where these can be numbered, else with relaxed times."""

from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import Steps
from apportion.cost.objective import Goal
from apportion.planner.options import Options, numbered_options, one_format, optimistic_options
from apportion.planner.relaxed import RelaxedGroup
from apportion.planner.share_costs import ShareCosts

FloatArray = NDArray[np.float64]


def exact_options(costs: ShareCosts, goal: Goal) -> Options:
    """With every member's memory."""
    options = numbered_options(costs, goal)
    if options is not None:
        return options
    relaxed = _relaxed(costs)
    least = np.full((len(costs.kinds.kinds), 2), inf)
    possible = costs.possible()
    least[possible] = relaxed.least(possible, goal)
    return _single(costs, np.maximum(least, relaxed.apart(goal)))


def quick_options(costs: ShareCosts, goal: Goal) -> Options:
    """With members' memory in sum."""
    options = optimistic_options(costs, goal)
    return _single(costs, _relaxed(costs).apart(goal)) if options is None else options


def _single(costs: ShareCosts, least: FloatArray) -> Options:
    """One option a kind, of these (path, occupied) seconds."""
    path_s = np.full((len(least), 1), inf)
    possible = costs.possible()
    path_s[possible, 0] = least[possible, 0]
    none = np.empty((0, len(costs.devices)), dtype=np.int64)
    return Options(path_s, least[:, 1:], np.full((len(least), 1), -1), none, none, one_format(none))


def _relaxed(costs: ShareCosts) -> RelaxedGroup:
    steps = Steps(prefill=costs.steps[:-1], decode=costs.steps[-1])
    return RelaxedGroup(costs.problem, costs.devices, costs.link, steps, costs.kinds)
