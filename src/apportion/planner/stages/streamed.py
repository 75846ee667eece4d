"""Stages that stream some of their layers, on a device or on all members of a group: as few as fit.

Fewer is never slower: computing stays the same, and what streaming adds grows with every layer (cost/streaming.py). So
with given shares the least number of streamed layers with which every member fits is the best, whatever other stages
do. Shares that let a stage stream fewer layers may beat those that compute faster, so of a stage that streams all
shares are looked at.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import Steps
from apportion.cost.group_step import Members, stage_members
from apportion.cost.host_memory import at_work
from apportion.cost.memory import shard_memory
from apportion.cost.objective import Goal
from apportion.cost.shard import LayerCounts
from apportion.cost.streaming import (
    added_s,
    arriving_s,
    arriving_s_per_byte,
    evenly_streamed,
    least_added_s_per_byte,
    streaming_order,
)
from apportion.planner.problem import Problem
from apportion.planner.stages.axes import Room, StageKind, ffn_granule, make_shard
from apportion.planner.stages.groups import device_figures
from apportion.planner.stages.kinds import StageKinds
from apportion.planner.stages.places import fixed_shares
from apportion.planner.stages.share_costs import CostedShares, ShareCosts, Shares, is_anywhere
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.model import LayerSpec
from apportion.types.plan import Stage

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def may_stream(problem: Problem, devices: Sequence[Device]) -> bool:
    """Whether a stage on these devices may."""
    return problem.streaming and all(device.stream_bytes_per_s is not None for device in devices)


def group_costs(
    problem: Problem, devices: Sequence[Device], link: Link | None, steps: Steps, kinds: StageKinds
) -> ShareCosts:
    costs = StreamedCosts if may_stream(problem, devices) else ShareCosts
    computing = at_work(problem.cluster, devices, overlapping=steps.overlapping)
    key = (
        costs,
        tuple(device_figures(device) for device in (*devices, *computing)),
        tuple(is_anywhere(problem, device) for device in devices),
        link and (link.latency_s, link.bytes_per_s),
        steps,
        problem.capacity,
        problem.formats,
        fixed_shares(problem, devices),
    )
    return kinds.known(key, lambda: costs(problem, devices, link, steps, kinds))


def fewest_streamed(problem: Problem, members: Members) -> LayerCounts | None:
    """The layers that a stage streams, of members' shards that hold all: the fewest with which every member fits; None
    where they do not fit even so."""
    beyond = [
        shard_memory(problem.model, shard, problem.capacity, device).engine_bytes - device.usable_bytes
        for device, shard in members
    ]
    if max(beyond) <= 0:
        return ()
    taken: LayerCounts = ()
    largest = [0] * len(members)
    for layer, count in streaming_order(problem.model, members[0][1].layers):
        sizes = [shard.layer_bytes(layer) for _, shard in members]
        largest = [max(pair) for pair in zip(largest, sizes, strict=True)]
        fewest = 1
        for (device, _), short, buffer, size in zip(members, beyond, largest, sizes, strict=True):
            fewest = max(fewest, -(-(short + device.stream_buffers * buffer) // size))
        if fewest <= count:
            return (*taken, (layer, fewest))
        taken = (*taken, (layer, count))
        beyond = [short - count * size for short, size in zip(beyond, sizes, strict=True)]
    return None


def with_streamed_layers(problem: Problem, stage: Stage) -> Stage:
    """The stage with the fewest layers streamed that its devices' memory asks for; none where that does not help."""
    stage = replace(stage, streamed_layers=())
    members = stage_members(problem.model, problem.cluster, stage)
    if not may_stream(problem, [device for device, _ in members]):
        return stage
    count = sum(number for _, number in fewest_streamed(problem, members) or ())
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


def group_rooms(
    problem: Problem, kinds: StageKinds, devices: Sequence[Device], number: int
) -> tuple[Room, ...]:
    """Of each member in a stage of the kind of this number: at least what it has, whether it streams or not."""
    rooms = kinds.rooms(problem.capacity, problem.formats, devices, number)
    if not may_stream(problem, devices):
        return rooms
    order = streaming_order(problem.model, kinds.kinds[number].layers)
    rooms_of_all: list[Room] = []
    for rank, (device, room) in enumerate(zip(devices, rooms, strict=True)):
        sizes = np.array([_layer_bytes(problem, rank, layer) for layer, _ in order])
        counts = np.array([count for _, count in order])
        saved = np.maximum(0, counts @ sizes - device.stream_buffers * sizes[0])
        rooms_of_all.append(_roomier(room, *(int(size) for size in saved)))
    return tuple(rooms_of_all)


def _roomier(room: Room, nothing: int, head: int, granule: int) -> Room:
    """With so much less needed; a granule takes a byte, which is given back."""
    return replace(
        room,
        free_bytes=room.free_bytes + nothing + room.num_granules,
        head_bytes=room.head_bytes - head,
        granule_bytes=room.granule_bytes - granule + 1,
    )


def _layer_bytes(problem: Problem, rank: int, layer: LayerSpec) -> tuple[int, int, int]:
    """Weights of a layer on a member: beside its shares, of a KV head, of an FFN granule."""
    kind = StageKind(layers=((layer, 1),), has_embedding=False, has_head=False)
    granule = ffn_granule(problem.model)

    def size(heads: int, columns: int) -> int:
        return make_shard(kind, problem.formats, rank, rank + 1, heads, columns, 0).layer_bytes(layer)

    nothing = size(0, 0)
    return nothing, size(1, 0) - nothing, size(0, granule) - nothing


def _in_ratio(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """One unit each, and the rest in the ratio of the weights, by rounding the running sum."""
    stops = np.rint((total - len(weights)) * np.cumsum(weights) / sum(weights)).astype(int)
    return tuple(int(units) + 1 for units in np.diff(stops, prepend=0))


class StreamedCosts(ShareCosts):
    """Of groups that may stream. Times are by step: copying beside computing takes the longer of the two in each."""

    def __init__(
        self, problem: Problem, devices: Sequence[Device], link: Link | None, steps: Steps, kinds: StageKinds
    ) -> None:
        super().__init__(problem, devices, link, steps, kinds)
        order = streaming_order(problem.model, tuple((layer, 1) for layer in kinds.layers))
        self._order = [layer for layer, _ in order]
        sorts = [streaming_order(problem.model, ((layer, 1),))[0][0] for layer in kinds.layers]
        self._counts = kinds.counts @ np.array([[sort is one for one in self._order] for sort in sorts], int)
        self._sizes = [
            [_layer_bytes(problem, rank, layer) for layer in self._order] for rank in range(len(devices))
        ]

    def _sum(self, by_step: FloatArray) -> FloatArray:
        return by_step

    def _layers(self, rank: int, place: int, heads: IntArray, granules: IntArray) -> IntArray:
        """By share: bytes of a member's part of a layer of the sort at this place."""
        nothing, head, granule = self._sizes[rank][place]
        return nothing + head * heads[:, rank] + granule * granules[:, rank]

    def _streamed(self, heads: IntArray, granules: IntArray, numbers: IntArray) -> tuple[BoolArray, IntArray]:
        """[kind, share]: whether it fits; [place, kind, share]: how many layers it streams, as `fewest_streamed`."""
        ranks = range(len(self.devices))
        found = self.holds(heads, granules, numbers)
        beyond = [self.beyond_bytes(rank, heads, granules, numbers) for rank in ranks]
        largest = [np.zeros(found.shape, dtype=np.int64) for _ in ranks]
        taken = np.zeros((len(self._order), *found.shape), dtype=np.int64)
        for place in range(len(self._order)):
            counts = self._counts[numbers, place][:, None]
            fewest = np.ones(found.shape, dtype=np.int64)
            for rank, device in enumerate(self.devices):
                size = self._layers(rank, place, heads, granules)
                largest[rank] = np.where(counts > 0, np.maximum(largest[rank], size), largest[rank])
                short = beyond[rank] + device.stream_buffers * largest[rank]
                fewest = np.maximum(fewest, -(-short // size))
                beyond[rank] = beyond[rank] - counts * size
            enough = fewest <= counts
            taken[place] = np.where(found, 0, np.where(enough, fewest, counts))
            found |= enough
        return found, taken

    def fits(self, heads: IntArray, granules: IntArray, numbers: IntArray) -> BoolArray:
        return self._streamed(heads, granules, numbers)[0]

    def timings(self, shares: CostedShares, numbers: IntArray) -> FloatArray:
        seconds = super().timings(shares, numbers)
        _, taken = self._streamed(shares.heads, shares.granules, numbers)
        for place, layers in enumerate(taken):
            seconds = seconds + layers[..., None] * self._added_s(shares, place)
        for rank, device in enumerate(self.devices):
            sizes = [self._layers(rank, place, shares.heads, shares.granules) for place in range(len(taken))]
            arriving = [layers * arriving_s(device, size) for layers, size in zip(taken, sizes, strict=True)]
            seconds = np.maximum(seconds, np.sum(arriving, axis=0)[..., None])
        return super()._sum(seconds)

    def _added_s(self, shares: CostedShares, place: int) -> FloatArray:
        """[share, step]: the slowest member's, of a layer of the sort at this place."""
        by_tokens: dict[int, FloatArray] = {}
        for tokens in {step.tokens for step in self.steps}:
            by_member = [
                added_s(
                    device,
                    self.problem.formats,
                    self._order[place],
                    shares.heads[:, rank],
                    self.granule * shares.granules[:, rank],
                    self._layers(rank, place, shares.heads, shares.granules),
                    tokens,
                )
                for rank, device in enumerate(self.devices)
            ]
            by_tokens[tokens] = np.max(by_member, axis=0)
        return np.stack([by_tokens[step.tokens] for step in self.steps], axis=-1)

    def least_timings(self, shares: CostedShares, numbers: IntArray) -> FloatArray:
        """A single device has one way to share; of several, these may not be the shares that stream least."""
        if len(self.devices) == 1:
            return self.timings(shares, numbers)
        seconds = super().timings(shares, numbers)
        slope, copies_s = self._copies()
        return super()._sum(np.maximum(seconds, slope * seconds + copies_s[numbers, None, None]))

    def further_shares(self) -> list[Shares]:
        """As the members' weights arrive, as their memory holds them, and between."""
        rates = [device.stream_bytes_per_s or 0.0 for device in self.devices]
        mixed = [
            [
                rate**part * device.usable_bytes ** (1 - part)
                for rate, device in zip(rates, self.devices, strict=True)
            ]
            for part in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        heads = self.problem.model.kv_heads
        return [(_in_ratio(heads, weights), _in_ratio(self.num_granules, weights)) for weights in mixed]

    def with_copies(self, least: FloatArray, goal: Goal) -> FloatArray:
        slope, copies_s = self._copies()
        num_prefill = len(self.steps) - 1
        weights = np.array(
            [
                goal.path_prefill * num_prefill + goal.path_decode,
                goal.occupied_prefill * num_prefill + goal.occupied_decode,
            ]
        )
        finite = np.where(np.isfinite(least), least, 0.0)
        return np.maximum(least, slope * finite + copies_s[:, None] * weights)

    def _copies(self) -> tuple[float, FloatArray]:
        """(a, b by kind): a step that computes for c seconds takes at least a·c + b, whatever the shares.

        With D bytes missing in sum, members stream x_g ≥ 0, Σ x_g ≥ D. In a step of T seconds one that copies itself
        streams at most (T − c)/s_g, one beside computing T·r_g; so D ≤ (T − c)·Σ 1/s_g + T·Σ r_g.
        """
        added = [least_added_s_per_byte(device) for device in self.devices]
        arriving = [arriving_s_per_byte(device) for device in self.devices]
        if any(a == b == 0.0 for a, b in zip(added, arriving, strict=True)):
            return 1.0, np.zeros(len(self._counts))
        itself = sum(1 / seconds for seconds in added if seconds)
        beside = sum(1 / seconds for seconds in arriving if seconds)
        return itself / (itself + beside), self._missing_bytes() / (itself + beside)

    def _missing_bytes(self) -> IntArray:
        """By kind: at least so many are streamed, by all members together; those that stream have buffers too."""
        missing = self.missing([self._bytes(rank) for rank in range(len(self.devices))])
        units = np.array([self.problem.model.kv_heads, self.num_granules])
        sizes = np.array(self._sizes)
        whole = sizes[:, :, 0].sum(axis=0) + sizes[:, :, 1:].min(axis=0) @ units
        first = (self._counts > 0).argmax(axis=1)
        buffers = min(device.stream_buffers for device in self.devices) * whole[first]
        return np.where(missing > 0, missing + buffers, 0)

    def possible(self) -> IntArray:
        if len(self.devices) == 1:
            whole = np.array([[self.problem.model.kv_heads]]), np.array([[self.num_granules]])
            return np.flatnonzero(self.fits(*whole, np.arange(len(self.kinds.kinds))))
        least = self.missing([self._least_bytes(rank) for rank in range(len(self.devices))])
        return np.union1d(super().possible(), np.flatnonzero(least <= 0))

    def _least_bytes(self, rank: int) -> IntArray:
        """By kind, with all layers streamed: no less is needed by any that streams."""
        first = (self._counts > 0).argmax(axis=1)
        sizes = np.array(self._sizes[rank])
        saved = self._counts @ sizes - self.devices[rank].stream_buffers * sizes[first]
        needed = self._bytes(rank).copy()
        needed[:, :3] -= np.maximum(0, saved)
        return needed
