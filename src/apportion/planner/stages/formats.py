"""Which weight formats a stage on a group may be best in, and the widest that a division's stages can have for free."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from apportion.cost.formats import Formats, head_row_bytes, parameters_bytes
from apportion.cost.memory import stages_memory
from apportion.cost.service import within_limits
from apportion.planner.problem import Problem
from apportion.planner.stages.axes import ffn_granule
from apportion.planner.stages.groups import common_formats
from apportion.planner.stages.kinds import StageKinds
from apportion.types.cluster import Device
from apportion.types.plan import Stage

SAME = 1 + 1e-12
"""Relative: objectives no further apart are equal."""


def group_problems(problem: Problem, devices: Sequence[Device], kinds: StageKinds) -> tuple[Problem, ...]:
    """The problem in each single format that all devices have, without those that another is never worse than."""
    known = common_formats(problem.weight_formats, devices)
    kept = list(known)
    for name in known:
        if any(_dominates(problem, other, name, devices, kinds) for other in kept if other != name):
            kept.remove(name)
    return tuple(problem.in_format(name) for name in kept)


def _dominates(
    problem: Problem, better: str, worse: str, devices: Sequence[Device], kinds: StageKinds
) -> bool:
    """Whether no stage, whatever its shares, needs fewer bytes or less time in `worse` than in `better`."""
    if any((device.rate(better) or 0.0) < (device.rate(worse) or 0.0) for device in devices):
        return False
    one, other = problem.in_format(better), problem.in_format(worse)
    return _reads_no_more(one.formats, other.formats, problem) and all(
        _holds_no_more(one, other, kinds, device, len(devices)) for device in devices
    )


def _reads_no_more(better: Formats, worse: Formats, problem: Problem) -> bool:
    """In every phase: attention of one KV head and of each further one, an FFN column, a row of the head."""
    for layer in set(problem.model.layers):
        head, column, replicated = (
            parameters_bytes(part, worse) - parameters_bytes(part, better)
            for part in (layer.per_kv_head, layer.per_ffn_column, layer.replicated)
        )
        if min(head, column, replicated + head) < 0:
            return False
    return head_row_bytes(problem.model, better) <= head_row_bytes(problem.model, worse)


def _holds_no_more(better: Problem, worse: Problem, kinds: StageKinds, device: Device, size: int) -> bool:
    """For one head and granule, and for each further one with the vocabulary rows that come with it."""
    model = better.model
    rows = -(-model.vocab_rows * ffn_granule(model) // model.ffn_columns)
    for rank in range(min(size, 2)):
        less = kinds.bytes(worse.capacity, worse.formats, device, rank=rank, size=size) - kinds.bytes(
            better.capacity, better.formats, device, rank=rank, size=size
        )
        nothing, head, granule, row = less.T
        granule = granule + rows * np.minimum(row, 0)
        if min(head.min(), granule.min(), (nothing + head + granule).min()) < 0:
            return False
    return True


def widened(problem: Problem, stages: tuple[Stage, ...], microbatches: int) -> tuple[Stage, ...]:
    """The stages, first to last, in the widest formats that fit, keep the limits and leave the objective as it is: of
    divisions as good as each other the one with the more exact weights."""

    def value(some: Sequence[Stage]) -> float:
        return problem.value(some, microbatches)

    if len(problem.weight_formats) == 1:
        return stages
    least = value(stages)
    for number, stage in enumerate(stages):
        for name in _wider(problem, stage):
            wider = (*stages[:number], replace(stage, weight_format=name), *stages[number + 1 :])
            kept = _fits(problem, wider[number]) and keeps_limits(problem, wider, microbatches)
            if kept and value(wider) <= least * SAME:
                stages = wider
                break
    return stages


def keeps_limits(problem: Problem, stages: Sequence[Stage], microbatches: int) -> bool:
    """Whether the division's estimate is within the workload's limits; the latency objective knows none."""
    if not problem.workload.limited:
        return True
    return within_limits(problem.workload, problem.estimate(stages, microbatches))


def _wider(problem: Problem, stage: Stage) -> tuple[str, ...]:
    """Widest first, those that all members have."""
    wider = problem.weight_formats[: problem.weight_formats.index(stage.weight_format)]
    members = [problem.cluster.device(device_id) for device_id in stage.split.device_ids]
    return common_formats(wider, members)


def _fits(problem: Problem, stage: Stage) -> bool:
    needed = stages_memory(problem.model, problem.cluster, [stage], problem.capacity)
    return all(
        memory.total_bytes <= problem.cluster.device(device_id).memory_bytes
        for device_id, memory in needed.items()
    )
