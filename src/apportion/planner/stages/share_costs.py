"""What many shares of one group cost, and whether they fit, for every kind of stage at once.

A stage's seconds are affine in how many layers of each sort it has, so each sort of layer is costed once.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import Steps
from apportion.cost.group_step import group_reductions_s
from apportion.cost.host_memory import at_work
from apportion.cost.objective import Goal, Timing
from apportion.cost.roofline import AnyStep, attention_table_s, ffn_column_s, head_row_s
from apportion.cost.traffic import LOGIT_BYTES, coordinator_host
from apportion.planner.problem import Problem
from apportion.planner.stages.axes import StageKind, ffn_granule, make_shard
from apportion.planner.stages.kinds import StageKinds
from apportion.types.cluster import Device, Link
from apportion.types.model import LayerSpec

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
NOWHERE_BYTES = 2**40
"""For every unit of an axis: in sum more than any device has, and still an int64."""
Shares = tuple[tuple[int, ...], tuple[int, ...]]
"""KV heads and FFN granules by member."""


@dataclass(frozen=True, slots=True)
class CostedShares:
    """Rows of heads and granules by member; seconds of one layer of each sort, and of the head, by row."""

    heads: IntArray
    granules: IntArray
    layers_s: FloatArray
    head_s: FloatArray


def is_anywhere(problem: Problem, device: Device) -> bool:
    """Whether the device may have a stage that is not the first."""
    engine, main = problem.constraints.engine, coordinator_host(problem.cluster)
    if engine is None or not engine.cpu_first or problem.any_coordinator:
        return True
    return device.kind != "cpu" or device.host != main


class ShareCosts:
    """Costs on one group in one weight format; times are pairs (whole prompt, one decode step) in the last axis."""

    def __init__(
        self, problem: Problem, devices: Sequence[Device], link: Link | None, steps: Steps, kinds: StageKinds
    ) -> None:
        self.problem = problem
        self.known: dict[Hashable, object] = {}
        """What others make of these costs: the options for a goal."""
        self.devices = at_work(problem.cluster, devices, overlapping=steps.overlapping)
        self.link = link
        self.steps = (*steps.prefill, steps.decode)
        self.kinds = kinds
        self.granule = ffn_granule(problem.model)
        self.num_granules = problem.model.ffn_columns // self.granule
        self.overhead_s = self._pair(lambda _: max(device.layer_overhead_s for device in devices))
        self.step_overhead_s = self._pair(lambda _: max(device.step_overhead_s for device in devices))
        self.embedding_s = self._pair(lambda _: 0.0)
        if link is not None and len(devices) > 1:
            layer = (problem.model.layers[0], 1)
            inner = self._reductions(link, StageKind(layers=(layer,), has_embedding=False, has_head=False))
            outer = self._reductions(link, StageKind(layers=(layer,), has_embedding=True, has_head=False))
            self.overhead_s = self.overhead_s + inner
            self.embedding_s = outer - inner

    @property
    def num_times(self) -> int:
        """In the last axis of times, while they are added up."""
        return self.step_overhead_s.shape[-1]

    def _reductions(self, link: Link, kind: StageKind) -> FloatArray:
        shard = make_shard(kind, self.problem.formats, 0, len(self.devices), 0, 0, 0)
        return self._pair(lambda step: group_reductions_s(self.problem.model, shard, link, step))

    def _pair(self, seconds: Callable[[AnyStep], float]) -> FloatArray:
        return self._sum(np.array([seconds(step) for step in self.steps]))

    def _sum(self, by_step: FloatArray) -> FloatArray:
        """(prefill, decode) from times by step in the last axis."""
        return np.stack([by_step[..., :-1].sum(axis=-1), by_step[..., -1]], axis=-1)

    def attention_s(self, layer: LayerSpec, heads: IntArray) -> FloatArray:
        """By row of heads: the slowest member's attention."""
        model, formats = self.problem.model, self.problem.formats
        slowest = np.zeros((len(heads), len(self.steps)))
        for rank, device in enumerate(self.devices):
            table = attention_table_s(
                device, model, layer, np.arange(model.kv_heads + 1), self.steps, formats
            )
            np.maximum(slowest, table[heads[:, rank]], out=slowest)
        return self._sum(slowest)

    def ffn_s(self, layer: LayerSpec, granules: IntArray) -> FloatArray:
        """By row of granules: the slowest member's FFN."""
        formats = self.problem.formats
        by_tokens = {
            tokens: np.max(
                granules
                * np.array([self.granule * ffn_column_s(d, layer, tokens, formats) for d in self.devices]),
                axis=1,
            )
            for tokens in {step.tokens for step in self.steps}
        }
        return self._sum(np.stack([by_tokens[step.tokens] for step in self.steps], axis=-1))

    def head_s(self, granules: IntArray) -> FloatArray:
        """By row of granules, which the vocabulary's rows follow: drawing tokens, with the gathering of logits."""
        rows = self.vocabulary_rows(granules)
        by_rows = {sampled: self._head(rows, sampled) for sampled in {s.sampled_rows for s in self.steps}}
        return self._sum(np.stack([by_rows[step.sampled_rows] for step in self.steps], axis=-1))

    def vocabulary_rows(self, granules: IntArray) -> IntArray:
        """As `axes.vocabulary_rows`, by row of granules."""
        running = np.cumsum(granules, axis=1)
        stops = (2 * self.problem.model.vocab_rows * running + self.num_granules) // (2 * self.num_granules)
        return np.diff(stops, axis=1, prepend=0)

    def _head(self, rows: IntArray, sampled: int) -> FloatArray:
        if sampled == 0:
            return np.zeros(len(rows))
        model, formats = self.problem.model, self.problem.formats
        rates = [head_row_s(device, model, sampled, formats) for device in self.devices]
        seconds = np.max(rows * np.array(rates), axis=1)
        if self.link is not None and len(self.devices) > 1:
            gathered_bytes = rows[:, 1:].max(axis=1) * sampled * LOGIT_BYTES
            seconds = seconds + self.link.latency_s + gathered_bytes / self.link.bytes_per_s
        return seconds

    def costed(self, heads: IntArray, granules: IntArray) -> "CostedShares":
        """Row by row."""
        layers = [self.attention_s(layer, heads) + self.ffn_s(layer, granules) for layer in self.kinds.layers]
        return CostedShares(heads, granules, np.stack(layers), self.head_s(granules))

    def costed_pairs(self, heads: IntArray, granules: IntArray) -> "CostedShares":
        """All heads with all granules, the granules the faster."""
        size = len(heads), len(granules)
        attention = np.stack([self.attention_s(layer, heads) for layer in self.kinds.layers])
        ffn = np.stack([self.ffn_s(layer, granules) for layer in self.kinds.layers])
        layers = attention[:, :, None] + ffn[:, None]
        return CostedShares(
            np.repeat(heads, size[1], axis=0),
            np.tile(granules, (size[0], 1)),
            layers.reshape(len(layers), size[0] * size[1], -1),
            np.tile(self.head_s(granules), (size[0], 1)),
        )

    def timings(self, shares: "CostedShares", numbers: IntArray) -> FloatArray:
        """[kind, share, (prefill, decode)] of the kinds of these numbers."""
        kinds = self.kinds
        fixed = self.step_overhead_s + np.where(kinds.has_embedding[numbers, None], self.embedding_s, 0.0)
        counts = kinds.counts[numbers]
        seconds = (fixed + counts.sum(axis=1)[:, None] * self.overhead_s)[:, None, :]
        for layer, layer_s in enumerate(shares.layers_s):
            seconds = seconds + counts[:, layer, None, None] * layer_s
        seconds[kinds.has_head[numbers]] += shares.head_s
        return seconds

    def timing(self, kind: int, kv_heads: Sequence[int], ffn_columns: Sequence[int]) -> Timing | None:
        """Of a stage with these shares; None where it does not fit."""
        heads, granules = np.array([kv_heads]), np.array([ffn_columns]) // self.granule
        if not self.fits(heads, granules, np.array([kind])).all():
            return None
        prefill_s, decode_s = self.timings(self.costed(heads, granules), np.array([kind]))[0, 0]
        return Timing(prefill_s=float(prefill_s), decode_s=float(decode_s))

    def least_timings(self, shares: "CostedShares", numbers: IntArray) -> FloatArray:
        """At most `timings`, whatever the memory."""
        return self.timings(shares, numbers)

    def further_shares(self) -> list[Shares]:
        """That a pool should have beside those that compute fast."""
        return []

    def with_copies(self, least: FloatArray, goal: Goal) -> FloatArray:
        """[kind, (path, occupied)] at least, from such of stages that hold all their layers."""
        del goal
        return least

    def possible(self) -> IntArray:
        """The kinds for which there is enough memory in sum."""
        return np.flatnonzero(self.missing([self._bytes(rank) for rank in range(len(self.devices))]) <= 0)

    def missing(self, members: Sequence[IntArray]) -> IntArray:
        """By kind: bytes beyond what there is in sum, at least, where members need so many (as `StageKinds.bytes`)."""
        model = self.problem.model
        units = np.array([model.kv_heads, self.num_granules, model.vocab_rows])
        nothing = sum(size[:, 0] for size in members)
        needed = nothing + np.minimum.reduce([size[:, 1:] for size in members]) @ units
        return needed - sum(device.usable_bytes for device in self.devices)

    def _bytes(self, rank: int) -> IntArray:
        problem = self.problem
        device, size = self.devices[rank], len(self.devices)
        needed = self.kinds.bytes(problem.capacity, problem.formats, device, rank=rank, size=size)
        if is_anywhere(problem, device):
            return needed
        return np.where(self.kinds.has_embedding[:, None], needed, NOWHERE_BYTES)

    def fits(self, heads: IntArray, granules: IntArray, numbers: IntArray) -> NDArray[np.bool_]:
        """[kind, share]: whether every member holds its own."""
        return self.holds(heads, granules, numbers)

    def holds(self, heads: IntArray, granules: IntArray, numbers: IntArray) -> NDArray[np.bool_]:
        """The same, with all layers' weights on the devices."""
        fits = np.ones((len(numbers), len(heads)), dtype=bool)
        for rank in range(len(self.devices)):
            fits &= self.beyond_bytes(rank, heads, granules, numbers) <= 0
        return fits

    def beyond_bytes(self, rank: int, heads: IntArray, granules: IntArray, numbers: IntArray) -> IntArray:
        """[kind, share]: what a member with all its layers' weights would need more than it has."""
        size = self._bytes(rank)[numbers, :, None]
        rows = -(-self.problem.model.vocab_rows * granules[:, rank] // self.num_granules)
        needed = size[:, 0] + size[:, 1] * heads[:, rank] + size[:, 2] * granules[:, rank] + size[:, 3] * rows
        return needed - self.devices[rank].usable_bytes
