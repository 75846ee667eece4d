"""Where in the model a group's stage may be: constraints that tie devices to layers, as a rule for each stage alone.

A stage with a layer that a device is tied to has that device and all its tied layers; any other stage is without it. As
every layer is in one stage, the tied layers of a device are in the same one, and it is in no other. So a division
keeps the constraints if each of its stages does, and how many tied devices are in use is all that a search has to know
of them: layers that are behind say which.
"""

from collections.abc import Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.planner.problem import Problem
from apportion.planner.stages.axes import ffn_granule, shared_in_ratio
from apportion.planner.stages.kinds import StageKinds
from apportion.types.cluster import Device
from apportion.types.constraints import FixedStage

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


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


class Places:
    """Of every group of a problem: which stages it may be."""

    def __init__(self, problem: Problem, groups: Sequence[Sequence[Device]], kinds: StageKinds) -> None:
        tied = problem.constraints.tied
        self.ranges = [allowed_ranges(problem, devices) if tied else None for devices in groups]
        """[start, stop]; None where it may be any."""
        self._kinds = [None if ranges is None else _kinds_of(ranges, kinds) for ranges in self.ranges]

    def of_kinds(self, group: int, by_kind: FloatArray) -> FloatArray:
        """[…, kind]: a group's costs, infinite for kinds of stages that it has no place for."""
        kinds = self._kinds[group]
        return by_kind if kinds is None else np.where(kinds, by_kind, inf)

    def of_ranges(self, group: int, by_range: FloatArray) -> FloatArray:
        """[start, stop]"""
        ranges = self.ranges[group]
        return by_range if ranges is None else np.where(ranges, by_range, inf)

    def of_stops(self, group: int, by_stop: FloatArray) -> FloatArray:
        """[stop, layers − 1]"""
        ranges = self.ranges[group]
        if ranges is None:
            return by_stop
        stop, layers = (axis + offset for axis, offset in zip(np.indices(by_stop.shape), (0, 1), strict=True))
        start = stop - layers
        return np.where((start >= 0) & ranges[np.maximum(start, 0), stop], by_stop, inf)


def _kinds_of(ranges: BoolArray, kinds: StageKinds) -> BoolArray:
    placed = np.zeros(len(kinds.kinds), dtype=bool)
    placed[kinds.index[ranges]] = True
    return placed
