"""Lower bounds on a stage's time on a group, phase by phase, without choosing shares.

In a phase member g takes t_g(u) for u units, nondecreasing in u. Whatever the shares, the slowest member takes
at least the smallest t for which the pairs (g, u) with t_g(u) ≤ t number the axis' units. Phases are bounded
apart from each other, and memory limits a member's units on one axis as if it held the least of the others; so
no choice of shares is faster, and on a single device the bound is exact. Where memory may tie the axes together
each composition of heads is bounded too, with the columns it leaves room for, as real numbers.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import Steps
from apportion.cost.group_step import group_reductions_s
from apportion.cost.objective import Goal, Timing
from apportion.cost.roofline import AnyStep, attention_table_s, ffn_column_s, head_row_s
from apportion.cost.traffic import LOGIT_BYTES
from apportion.planner.problem import Problem
from apportion.planner.stages.axes import Room, StageKind, ffn_granule, head_compositions, make_shard
from apportion.planner.stages.kinds import StageKinds
from apportion.planner.stages.shared_level import shared_level
from apportion.planner.stages.streamed import group_rooms
from apportion.types.cluster import Device, Link
from apportion.types.model import LayerSpec

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Caps = tuple[int, ...]


class _Tied(NamedTuple):
    """A kind of stage where memory ties heads and columns together."""

    row: int
    number: int
    rooms: tuple[Room, ...]
    fixed: FloatArray


class RelaxedGroup:
    """Bounds for the stages of one group."""

    def __init__(
        self, problem: Problem, devices: Sequence[Device], link: Link | None, steps: Steps, kinds: StageKinds
    ) -> None:
        self.problem = problem
        self.kinds = kinds
        self.devices = devices
        self.link = link
        self.steps = (*steps.prefill, steps.decode)
        self.granule = ffn_granule(problem.model)
        self.num_granules = problem.model.ffn_columns // self.granule
        self.compositions = head_compositions(problem.model.kv_heads, len(devices))
        self._composed: dict[LayerSpec, FloatArray] = {}
        self._attention: dict[tuple[LayerSpec, Caps], FloatArray] = {}
        self._ffn: dict[tuple[LayerSpec, Caps], FloatArray] = {}
        self._rates: dict[tuple[LayerSpec, int], list[float]] = {}

    def least(self, numbers: Sequence[int] | IntArray, goal: Goal) -> FloatArray:
        """[number, (path, occupied)] of the kinds of these numbers: no shares have less; infinite where none fit."""
        least = np.full((len(numbers), 2), inf)
        tied: list[_Tied] = []
        for row, number in enumerate(numbers):
            kind = self.kinds.kinds[number]
            rooms = group_rooms(self.problem, self.kinds, self.devices, int(number))
            caps = self._caps(rooms)
            if caps is None or not self._fits_together(rooms):
                continue
            fixed = self._fixed(kind)
            apart = self._apart(kind, caps, fixed)
            least[row] = goal.path_s(apart), goal.occupied_s(apart)
            if len(rooms) > 1 and any(room.granules(max(caps[0])) < self.num_granules for room in rooms):
                tied.append(_Tied(row, int(number), rooms, fixed))
        if tied:
            rows = [one.row for one in tied]
            least[rows] = np.maximum(least[rows], self._together(tied, goal))
        return least

    def apart(self, goal: Goal) -> FloatArray:
        """[kind, (path, occupied)]: as `least`, and quicker, with memory counted in sum only."""
        kinds = self.kinds
        most = self.problem.model.kv_heads - len(self.devices) + 1
        caps = (
            (most,) * len(self.devices),
            (self.num_granules - len(self.devices) + 1,) * len(self.devices),
        )
        layers = [self._attention_s(layer, caps[0]) + self._ffn_s(layer, caps[1]) for layer in kinds.layers]
        bare = StageKind(layers=((kinds.layers[0], 1),), has_embedding=False, has_head=False)
        fixed = self._fixed(bare)
        deeper = self._fixed(replace(bare, layers=((kinds.layers[0], 2),))) - fixed
        first = self._fixed(replace(bare, has_embedding=True)) - fixed
        last = self._fixed(replace(bare, has_head=True)) - fixed
        seconds = kinds.counts @ (np.array(layers) + deeper) + (fixed - deeper)
        seconds = seconds + np.outer(kinds.has_embedding, first) + np.outer(kinds.has_head, last)
        apart = np.stack([seconds[:, :-1].sum(axis=1), seconds[:, -1]], axis=1)
        weights = np.array(
            [[goal.path_prefill, goal.path_decode], [goal.occupied_prefill, goal.occupied_decode]]
        )
        gained = [[self._gain(layer, caps, *pair) for pair in weights] for layer in kinds.layers]
        return apart @ weights.T + kinds.counts @ np.array(gained)

    def _gain(self, layer: LayerSpec, caps: tuple[Caps, Caps], prefill: float, decode: float) -> float:
        """What a layer costs more, weighted, where one choice of shares has to do for prefill and for decode."""
        by_step = np.array([prefill] * (len(self.steps) - 1) + [decode])
        attention = float((self._composed_attention(layer) @ by_step).min())
        weights: dict[int, float] = {}
        for step, weight in zip(self.steps, by_step, strict=True):
            weights[step.tokens] = weights.get(step.tokens, 0.0) + float(weight)
        ffn = shared_level(
            np.array([self._granule_rates(layer, tokens) for tokens in weights]),
            np.array(list(weights.values())),
            self.num_granules,
        )
        apart_attention = float(self._attention_s(layer, caps[0]) @ by_step)
        apart_ffn = float(self._ffn_s(layer, caps[1]) @ by_step)
        return max(0.0, attention - apart_attention) + max(0.0, ffn - apart_ffn)

    def _apart(self, kind: StageKind, caps: tuple[Caps, Caps], fixed: FloatArray) -> Timing:
        """Each axis limited by memory on its own."""
        seconds = fixed.copy()
        for layer, count in kind.layers:
            seconds += count * (self._attention_s(layer, caps[0]) + self._ffn_s(layer, caps[1]))
        return Timing(prefill_s=float(seconds[:-1].sum()), decode_s=float(seconds[-1]))

    def _together(self, tied: Sequence["_Tied"], goal: Goal) -> FloatArray:
        """[kind, (path, occupied)] over compositions of heads, with the columns that memory leaves beside them."""
        caps = self._granule_caps([one.rooms for one in tied])
        holding = (caps.sum(axis=2) >= self.num_granules) & (caps.min(axis=2) >= 1)
        row, composition = np.nonzero(holding)
        caps = caps[holding]
        numbers = np.array([one.number for one in tied])[row]
        seconds = np.array([one.fixed for one in tied])[row]
        for layer, counts in zip(self.kinds.layers, self.kinds.counts[numbers].T, strict=True):
            layer_s = self._composed_attention(layer)[composition] + self._ffn_levels(layer, caps)
            seconds += counts[:, None] * layer_s
        headed = self.kinds.has_head[numbers]
        seconds[headed] += self._further_head(caps[headed])
        prefill_s, decode_s = seconds[:, :-1].sum(axis=1), seconds[:, -1]
        least = np.full((len(tied), 2), inf)
        np.minimum.at(least[:, 0], row, goal.path_prefill * prefill_s + goal.path_decode * decode_s)
        np.minimum.at(least[:, 1], row, goal.occupied_prefill * prefill_s + goal.occupied_decode * decode_s)
        return least

    def _granule_caps(self, rooms: Sequence[Sequence[Room]]) -> IntArray:
        """[kind, composition, member]: the granules that memory leaves beside the composition's heads."""
        heads = np.arange(self.problem.model.kv_heads + 1)
        beside = {room: room.granules_beside(heads) for members in rooms for room in members}
        by_heads = np.array([[beside[room] for room in members] for members in rooms])
        return by_heads[:, np.arange(len(self.devices)), self.compositions]

    def _ffn_levels(self, layer: LayerSpec, caps: IntArray) -> FloatArray:
        """By row of caps and step."""
        by_tokens = {
            tokens: _real_level(np.array(self._granule_rates(layer, tokens)), caps, self.num_granules)
            for tokens in {step.tokens for step in self.steps}
        }
        return np.stack([by_tokens[step.tokens] for step in self.steps], axis=1)

    def _further_head(self, caps: IntArray) -> FloatArray:
        """What the head takes beyond its bound in `_fixed`, for rows that follow at most `caps` granules."""
        model, formats = self.problem.model, self.problem.formats
        most_rows = model.vocab_rows * caps // self.num_granules + 1
        further = np.zeros((len(caps), len(self.steps)))
        for column, step in enumerate(self.steps):
            if step.sampled_rows:
                rates = [head_row_s(device, model, step.sampled_rows, formats) for device in self.devices]
                head_s = _real_level(np.array(rates), most_rows, model.vocab_rows)
                further[:, column] = np.maximum(0, head_s - self._head_s(step))
        return further

    def _composed_attention(self, layer: LayerSpec) -> FloatArray:
        """Slowest member's attention by composition and step."""
        if layer not in self._composed:
            model, formats = self.problem.model, self.problem.formats
            slowest = np.zeros((len(self.compositions), len(self.steps)))
            for device, held in zip(self.devices, self.compositions.T, strict=True):
                table = attention_table_s(
                    device, model, layer, np.arange(model.kv_heads + 1), self.steps, formats
                )
                slowest = np.maximum(slowest, table[held])
            self._composed[layer] = slowest
        return self._composed[layer]

    def _granule_rates(self, layer: LayerSpec, tokens: int) -> list[float]:
        if (layer, tokens) not in self._rates:
            formats = self.problem.formats
            self._rates[layer, tokens] = [
                self.granule * ffn_column_s(device, layer, tokens, formats) for device in self.devices
            ]
        return self._rates[layer, tokens]

    def _caps(self, rooms: Sequence[Room]) -> tuple[Caps, Caps] | None:
        """The most heads and the most granules of each member, each beside the least of the other."""
        model, others = self.problem.model, len(rooms) - 1
        heads = tuple(
            min((room.free_bytes - room.granule_bytes) // room.head_bytes, model.kv_heads - others)
            for room in rooms
        )
        granules = tuple(
            min((room.free_bytes - room.head_bytes) // room.granule_bytes, self.num_granules - others)
            for room in rooms
        )
        enough = sum(heads) >= model.kv_heads and sum(granules) >= self.num_granules
        return (heads, granules) if enough and min(*heads, *granules) >= 1 else None

    def _fits_together(self, rooms: Sequence[Room]) -> bool:
        model = self.problem.model
        needed = (
            model.kv_heads * min(room.head_bytes for room in rooms)
            + self.num_granules * min(room.granule_bytes for room in rooms)
            + model.vocab_rows * min(room.row_bytes for room in rooms)
        )
        return needed <= sum(room.free_bytes for room in rooms)

    def _attention_s(self, layer: LayerSpec, caps: Caps) -> FloatArray:
        """By step."""
        if (layer, caps) not in self._attention:
            model, formats = self.problem.model, self.problem.formats
            times = np.concatenate(
                [
                    attention_table_s(device, model, layer, np.arange(1, cap + 1), self.steps, formats)
                    for device, cap in zip(self.devices, caps, strict=True)
                ]
            )
            firsts = np.cumsum((0, *caps[:-1]))
            self._attention[layer, caps] = _smallest_reaching(times, firsts, model.kv_heads)
        return self._attention[layer, caps]

    def _ffn_s(self, layer: LayerSpec, caps: Caps) -> FloatArray:
        """By step; steps of equally many tokens take equally long."""
        if (layer, caps) not in self._ffn:
            tokens = sorted({step.tokens for step in self.steps})
            units = np.concatenate([np.arange(1.0, cap + 1) for cap in caps])
            firsts = np.cumsum((0, *caps[:-1]))
            rates = np.array([self._granule_rates(layer, count) for count in tokens]).T
            times = units[:, None] * np.repeat(rates, caps, axis=0)
            by_tokens = dict(zip(tokens, _smallest_reaching(times, firsts, self.num_granules), strict=True))
            self._ffn[layer, caps] = np.array([by_tokens[step.tokens] for step in self.steps])
        return self._ffn[layer, caps]

    def _fixed(self, kind: StageKind) -> FloatArray:
        """Overhead, reductions and the head, by step."""
        num_layers = sum(count for _, count in kind.layers)
        overhead_s = num_layers * max(device.layer_overhead_s for device in self.devices)
        overhead_s += max(device.step_overhead_s for device in self.devices)
        seconds = np.full(len(self.steps), overhead_s, dtype=np.float64)
        if len(self.devices) > 1:
            assert self.link is not None
            shard = make_shard(kind, self.problem.formats, 0, len(self.devices), 0, 0, 0)
            seconds += [group_reductions_s(self.problem.model, shard, self.link, step) for step in self.steps]
        if kind.has_head:
            seconds += [self._head_s(step) for step in self.steps]
        return seconds

    def _head_s(self, step: AnyStep) -> float:
        """Head and gathering for real-valued rows: convex in rank 0's rows, so least at an end or at the kink."""
        if step.sampled_rows == 0:
            return 0.0
        model, formats = self.problem.model, self.problem.formats
        root, *others = [head_row_s(device, model, step.sampled_rows, formats) for device in self.devices]
        if not others:
            return model.vocab_rows * root
        assert self.link is not None
        others_rate = sum(1 / rate for rate in others)
        row_s = step.sampled_rows * LOGIT_BYTES / self.link.bytes_per_s / len(others)
        kink = model.vocab_rows / (1 + root * others_rate)
        return self.link.latency_s + min(
            max(rows * root, (model.vocab_rows - rows) / others_rate) + (model.vocab_rows - rows) * row_s
            for rows in (0.0, kink, model.vocab_rows)
        )


def _smallest_reaching(times: FloatArray, firsts: IntArray, units: int) -> FloatArray:
    """The `units`-th smallest time of each column, and at least every member's first unit (rows `firsts`)."""
    return np.maximum(np.partition(times, units - 1, axis=0)[units - 1], times[firsts].max(axis=0))


def _real_level(rates: FloatArray, caps: IntArray, total: int) -> FloatArray:
    """By row of caps, which reach the total: the level at which real-valued units of at most `caps` do."""
    open_members = np.ones(caps.shape, dtype=bool)
    level = np.zeros(len(caps))
    for _ in range(len(rates)):
        left = total - np.where(open_members, 0, caps).sum(axis=1)
        reach = (open_members / rates).sum(axis=1)
        level = np.where(reach > 0, left / np.maximum(reach, 1e-300), level)
        open_members &= caps * rates >= level[:, None]
    return level * (1 - 1e-9)
