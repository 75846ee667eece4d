"""The best integer shares of one stage on one group, under memory.

The cost is what the stage adds to the objective where it is alone or the bottleneck:
w_p·prefill + w_d·decode, each a sum over phases of the slowest member. Attention depends on the heads alone,
FFN and head on the columns (rows follow them); memory couples the two. Heads are enumerated in order of their
attention time, columns filled exactly for each, until attention + unlimited columns is no better.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import Steps
from apportion.cost.group_step import Members, group_rest_s
from apportion.cost.host_memory import at_work
from apportion.cost.objective import Goal, Timing
from apportion.cost.roofline import AnyStep, attention_table_s, ffn_column_s, head_row_s
from apportion.cost.traffic import LOGIT_BYTES
from apportion.planner.problem import Problem
from apportion.planner.stages.axes import (
    Room,
    StageKind,
    ffn_granule,
    head_compositions,
    make_shard,
    vocabulary_rows,
)
from apportion.planner.stages.fill import Filling, Rates, fill, merge_parallel, water_fill
from apportion.planner.stages.kinds import StageKinds
from apportion.planner.stages.share_costs import Shares
from apportion.planner.stages.streamed import group_rooms
from apportion.types.cluster import Device, Link
from apportion.types.model import LayerSpec

FloatArray = NDArray[np.float64]

POOL_HEADS = 3
"""Ways to share the heads, the fastest that fit, that a pool tries for one kind of stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    kv_heads: tuple[int, ...]
    ffn_columns: tuple[int, ...]
    vocab_rows: tuple[int, ...]
    weight_format: str
    timing: Timing


class GroupMemory:
    """The room each member of a group has in one weight format, by kind of stage; the same for every objective. Where
    the group may stream, the most that it may have."""

    def __init__(self, problem: Problem, devices: Sequence[Device], kinds: StageKinds) -> None:
        self.problem = problem
        self.devices = tuple(devices)
        self._kinds = kinds
        self._rooms: dict[StageKind, tuple[Room, ...]] = {}
        self.pool: list[Shares] = []
        """Shares worth a look in any stage; those of one number of microbatches do for the others."""

    def rooms(self, kind: StageKind) -> tuple[Room, ...]:
        if kind not in self._rooms:
            number = self._kinds.number(kind)
            self._rooms[kind] = group_rooms(self.problem, self._kinds, self.devices, number)
        return self._rooms[kind]


class GroupShares:
    """Chooses shares for the stages of one group, for one goal."""

    def __init__(self, memory: GroupMemory, link: Link | None, goal: Goal, steps: Steps) -> None:
        self.memory = memory
        self.problem = memory.problem
        self.devices = at_work(self.problem.cluster, memory.devices, overlapping=steps.overlapping)
        self.link = link
        self.goal = goal
        self.steps = steps
        self.compositions = head_compositions(self.problem.model.kv_heads, len(self.devices))
        self._attention: dict[LayerSpec, tuple[FloatArray, FloatArray]] = {}
        self._classes = Counter((step.tokens, step.sampled_rows) for step in steps.prefill)
        self._class_steps = {(step.tokens, step.sampled_rows): step for step in steps.prefill}

    def holds(self, kind: StageKind) -> bool:
        """Whether the group's memory can hold such a stage."""
        num_granules = self.problem.model.ffn_columns // ffn_granule(self.problem.model)
        caps = self._caps(kind)
        return bool(((caps.min(axis=1) >= 1) & (caps.sum(axis=1) >= num_granules)).any())

    def near(self, kind: StageKind) -> set[Shares]:
        """Shares that are quick to find and near the best: balanced for the whole, for prefill, for decode."""
        num_granules = self.problem.model.ffn_columns // ffn_granule(self.problem.model)
        caps = self._caps(kind)
        holding = np.flatnonzero((caps.min(axis=1) >= 1) & (caps.sum(axis=1) >= num_granules))
        order = holding[np.argsort(self._attention_cost(kind)[holding], kind="stable")]
        rates = self._rates(kind)
        directions = [tuple(map(sum, zip(*rates, strict=True))), *merge_parallel(rates)]
        return {
            (
                tuple(int(held) for held in self.compositions[index]),
                water_fill(direction, [int(cap) for cap in caps[index]], num_granules),
            )
            for index in order[:POOL_HEADS]
            for direction in directions
        }

    def choose(self, kind: StageKind) -> StageChoice | None:
        """None where the group's memory cannot hold such a stage."""
        rooms = self.memory.rooms(kind)
        num_granules = self.problem.model.ffn_columns // ffn_granule(self.problem.model)
        rates = merge_parallel(self._rates(kind))
        unlimited = fill(rates, [num_granules] * len(self.devices), num_granules)
        if unlimited is None or len(self.compositions) == 0:
            return None
        attention = self._attention_cost(kind)
        fastest = int(attention.argmin())
        heads = self.compositions[fastest]
        if all(room.fits(int(h), c) for room, h, c in zip(rooms, heads, unlimited.units, strict=True)):
            return self._choice(kind, fastest, unlimited)
        return self._choose_limited(kind, rates, attention, unlimited.value, num_granules)

    def _choose_limited(
        self,
        kind: StageKind,
        rates: Sequence[Rates],
        attention: FloatArray,
        least_ffn: float,
        num_granules: int,
    ) -> StageChoice | None:
        caps = self._caps(kind)
        holding = np.flatnonzero((caps.min(axis=1) >= 1) & (caps.sum(axis=1) >= num_granules))
        best: tuple[float, int, Filling] = (inf, -1, Filling((), 0.0, 0.0))
        for index in holding[np.argsort(attention[holding], kind="stable")]:
            attention_s = float(attention[index])
            if attention_s + least_ffn >= best[0]:
                break
            filled = fill(rates, [int(cap) for cap in caps[index]], num_granules)
            if filled is not None and attention_s + filled.value < best[0]:
                best = (attention_s + filled.value, int(index), filled)
        return self._choice(kind, best[1], best[2]) if best[1] >= 0 else None

    def _caps(self, kind: StageKind) -> NDArray[np.int64]:
        """The most FFN granules of each member beside its heads, for every composition."""
        heads = np.arange(int(self.compositions.max()) + 1)
        rooms = zip(self.memory.rooms(kind), self.compositions.T, strict=True)
        return np.stack([room.granules_beside(heads)[held] for room, held in rooms], axis=1)

    def _attention_cost(self, kind: StageKind) -> FloatArray:
        prefill_weight, decode_weight = self.goal.stage_weights
        prefill, decode = self._attention_times(kind)
        return prefill_weight * prefill + decode_weight * decode

    def _attention_times(self, kind: StageKind) -> tuple[FloatArray, FloatArray]:
        prefill = np.zeros(len(self.compositions))
        decode = np.zeros(len(self.compositions))
        for layer, count in kind.layers:
            if layer not in self._attention:
                self._attention[layer] = (
                    self._layer_attention(layer, self.steps.prefill).sum(axis=1),
                    self._layer_attention(layer, [self.steps.decode]).sum(axis=1),
                )
            layer_prefill, layer_decode = self._attention[layer]
            prefill += count * layer_prefill
            decode += count * layer_decode
        return prefill, decode

    def _layer_attention(self, layer: LayerSpec, steps: Sequence[AnyStep]) -> FloatArray:
        """Slowest member's attention time, by composition and step."""
        model, formats = self.problem.model, self.problem.formats
        slowest = np.zeros((len(self.compositions), len(steps)))
        for rank, device in enumerate(self.devices):
            table = attention_table_s(
                device, model, layer, np.arange(model.kv_heads + 1), tuple(steps), formats
            )
            slowest = np.maximum(slowest, table[self.compositions[:, rank]])
        return slowest

    def _rates(self, kind: StageKind) -> list[Rates]:
        """Weighted seconds per FFN granule of each member, by phase: FFN, vocabulary head, gathering of logits."""
        prefill_weight, decode_weight = self.goal.stage_weights
        phases = [
            (self._class_steps[key], prefill_weight * count) for key, count in self._classes.items()
        ] + [(self.steps.decode, decode_weight)]
        rates: list[Rates] = []
        for step, weight in phases:
            rates += [self._ffn_rates(layer, step, weight * count) for layer, count in kind.layers]
            if kind.has_head:
                rates += self._head_rates(step, weight)
        return rates

    def _ffn_rates(self, layer: LayerSpec, step: AnyStep, weight: float) -> Rates:
        granule = ffn_granule(self.problem.model)
        return tuple(
            weight * granule * ffn_column_s(device, layer, step.tokens, self.problem.formats)
            for device in self.devices
        )

    def _head_rates(self, step: AnyStep, weight: float) -> list[Rates]:
        model = self.problem.model
        rows_per_granule = model.vocab_rows * ffn_granule(model) / model.ffn_columns
        head = tuple(
            weight * rows_per_granule * head_row_s(device, model, step.sampled_rows, self.problem.formats)
            for device in self.devices
        )
        if self.link is None or len(self.devices) == 1:
            return [head]
        gathered_s = weight * rows_per_granule * step.sampled_rows * LOGIT_BYTES / self.link.bytes_per_s
        return [head, (0.0, *(gathered_s for _ in self.devices[1:]))]

    def _choice(self, kind: StageKind, composition: int, filled: Filling) -> StageChoice:
        granule = ffn_granule(self.problem.model)
        heads = tuple(int(count) for count in self.compositions[composition])
        columns = tuple(granule * units for units in filled.units)
        rows = vocabulary_rows(self.problem.model.vocab_rows, filled.units)
        size = len(self.devices)
        members = [
            (
                device,
                make_shard(kind, self.problem.formats, rank, size, heads[rank], columns[rank], rows[rank]),
            )
            for rank, device in enumerate(self.devices)
        ]
        prefill, decode = self._attention_times(kind)
        timing = self._timing(members, float(prefill[composition]), float(decode[composition]))
        return StageChoice(
            kv_heads=heads,
            ffn_columns=columns,
            vocab_rows=rows,
            weight_format=self.problem.formats.weights,
            timing=timing,
        )

    def _timing(self, members: Members, attention_prefill_s: float, attention_decode_s: float) -> Timing:
        model = self.problem.model
        rest_s = sum(
            count * group_rest_s(model, members, self.link, self._class_steps[key])
            for key, count in self._classes.items()
        )
        return Timing(
            prefill_s=attention_prefill_s + rest_s,
            decode_s=attention_decode_s + group_rest_s(model, members, self.link, self.steps.decode),
        )
