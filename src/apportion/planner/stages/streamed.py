"""Stages that stream some of their layers: a single device's, with as few layers streamed as fit.

Fewer is never slower: computing stays the same and copying takes as long as its bytes (cost/streaming.py), of which the
rule (largest layers first) gives fewer for fewer layers. So of all numbers of streamed layers the least that fits is
the best for every stage, whatever the others do. Groups hold all of theirs.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import Steps
from apportion.cost.group_step import group_step_s
from apportion.cost.memory import shard_memory
from apportion.cost.shard import LayerCounts, Shard
from apportion.cost.streaming import evenly_streamed
from apportion.planner.problem import Problem
from apportion.planner.stages.axes import StageKind, make_shard
from apportion.planner.stages.kinds import StageKinds, stage_kind
from apportion.planner.stages.share_costs import CostedShares, ShareCosts
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.plan import Stage

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def may_stream(problem: Problem, devices: Sequence[Device]) -> bool:
    """Whether a stage on these devices may."""
    return problem.streaming and len(devices) == 1 and devices[0].stream_bytes_per_s is not None


def group_costs(
    problem: Problem, devices: Sequence[Device], link: Link | None, steps: Steps, kinds: StageKinds
) -> ShareCosts:
    costs = StreamedCosts if may_stream(problem, devices) else ShareCosts
    return costs(problem, devices, link, steps, kinds)


def streamed_shard(problem: Problem, device: Device, kind: StageKind) -> Shard | None:
    """A whole stage of this kind on the device, with the fewest layers streamed; None where it does not fit even so."""
    model = problem.model
    shard = make_shard(kind, problem.formats, 0, 1, model.kv_heads, model.ffn_columns, model.vocab_rows)
    needed = shard_memory(model, shard, problem.capacity, device).engine_bytes
    if needed <= device.usable_bytes:
        return shard
    largest_first = sorted(kind.layers, key=lambda part: shard.layer_bytes(part[0]), reverse=True)
    needed += device.stream_buffers * shard.layer_bytes(largest_first[0][0])
    streamed: list[tuple[LayerCounts, int]] = []
    taken: LayerCounts = ()
    for layer, count in largest_first:
        for number in range(1, count + 1):
            streamed.append(((*taken, (layer, number)), shard.layer_bytes(layer)))
        taken = (*taken, (layer, count))
    for chosen, freed_bytes in streamed:
        needed -= freed_bytes
        if needed <= device.usable_bytes:
            return replace(shard, streamed=chosen)
    return None


def with_streamed_layers(problem: Problem, stage: Stage) -> Stage:
    """The stage with the fewest layers streamed that its device's memory asks for; none where that does not help."""
    problem = problem.in_format(stage.weight_format)
    devices = [problem.cluster.device(device_id) for device_id in stage.split.device_ids]
    stage = replace(stage, streamed_layers=())
    if not may_stream(problem, devices):
        return stage
    kind = stage_kind(problem.model, stage.layer_start, stage.layer_stop)
    shard = streamed_shard(problem, devices[0], kind)
    count = sum(number for _, number in shard.streamed) if shard else 0
    return replace(
        stage,
        streamed_layers=evenly_streamed(problem.model, stage.layer_start, stage.layer_stop, count),
    )


def streams_as_it_can(cluster: Cluster, stage: Stage) -> bool:
    """Layers of the stage, each once and in order; a device that is not in the cluster is not judged."""
    layers = stage.streamed_layers
    devices = [device for device in cluster.devices if device.id in stage.split.device_ids]
    return not layers or (
        layers == tuple(sorted(set(layers)))
        and stage.layer_start <= layers[0]
        and layers[-1] < stage.layer_stop
        and all(device.stream_bytes_per_s for device in devices)
    )


class StreamedCosts(ShareCosts):
    """Of a single device: there is one way to share, and every kind of stage has its streamed layers."""

    def __init__(
        self, problem: Problem, devices: Sequence[Device], link: Link | None, steps: Steps, kinds: StageKinds
    ) -> None:
        super().__init__(problem, devices, link, steps, kinds)
        self._shards = [streamed_shard(problem, devices[0], kind) for kind in kinds.kinds]

    def possible(self) -> IntArray:
        return np.flatnonzero([shard is not None for shard in self._shards])

    def fits(self, heads: IntArray, granules: IntArray, numbers: IntArray) -> NDArray[np.bool_]:
        assert len(heads) == len(granules) == 1
        return np.array([self._shards[int(number)] is not None for number in numbers], dtype=bool)[:, None]

    def timings(self, shares: CostedShares, numbers: IntArray) -> FloatArray:
        seconds = super().timings(shares, numbers)
        for place, number in enumerate(numbers):
            shard = self._shards[int(number)]
            if shard is not None and shard.streamed:
                seconds[place, 0] = self._step_s(shard)
        return seconds

    def _step_s(self, shard: Shard) -> FloatArray:
        members = [(self.devices[0], shard)]
        return self._pair(lambda step: group_step_s(self.problem.model, members, None, step))
