"""Where in the model a group's stage may be: constraints that tie devices to layers, as a rule for each stage alone.

A stage with a layer that a device is tied to has that device and all its tied layers; any other stage is without it. As
every layer is in one stage, the tied layers of a device are in the same one, and it is in no other. So a division
keeps the constraints if each of its stages does, and how many tied devices are in use is all that a search has to know
of them: layers that are behind say which.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apportion.planner.problem import Problem
from apportion.planner.stages.axes import ffn_granule, shared_in_ratio
from apportion.types.cluster import Device
from apportion.types.constraints import FixedStage

BoolArray = NDArray[np.bool_]


def allowed_ranges(problem: Problem, devices: Sequence[Device]) -> BoolArray:
    """[start, stop] of the stages that a group of these devices may be."""
    bounds = np.arange(problem.model.num_layers + 1)
    start, stop = bounds[:, None], bounds[None, :]
    allowed = start < stop
    held = {device.id for device in devices}
    for one in problem.constraints.tied:
        meets = (start < one.layer_stop) & (one.layer_start < stop)
        if isinstance(one, FixedStage):
            whole = (start == one.layer_start) & (stop == one.layer_stop)
            right = held == set(one.device_ids)
        else:
            whole = (start <= one.layer_start) & (stop >= one.layer_stop)
            right = one.device_id in held
        allowed &= np.where(meets, whole & right, held.isdisjoint(one.device_ids))
    return allowed


def fixed_shares(
    problem: Problem, devices: Sequence[Device]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """KV heads and FFN granules by member, where the constraints leave no choice."""
    constraints, model = problem.constraints, problem.model
    stage = constraints.stage_of(devices[0].id)
    ratio = dict(zip(stage.device_ids, stage.shares, strict=True)) if stage and stage.shares else {}
    if ratio:
        weights = [ratio.get(device.id, 1) for device in devices]
    elif constraints.groups == "even":
        weights = [1] * len(devices)
    else:
        return None
    num_granules = model.ffn_columns // ffn_granule(model)
    return shared_in_ratio(model.kv_heads, weights), shared_in_ratio(num_granules, weights)
