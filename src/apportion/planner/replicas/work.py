"""What a group of devices needs at least for a token, were all layers its own and its shares any real numbers.

A member with a share s of a layer's heads takes at least s times what it takes for all of them, so the slowest of a
group takes at least 1 / Σ(1 / its members' times for the whole): the same holds for FFN columns and vocabulary rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import Steps, hop_timing, workload_steps
from apportion.cost.formats import Formats
from apportion.cost.objective import Timing
from apportion.cost.roofline import AnyStep, attention_s, ffn_column_s, head_row_s
from apportion.cost.shard import layer_counts
from apportion.cost.traffic import host_link, layer_reductions, reduction_s
from apportion.planner.problem import Problem, activation_format, kv_format
from apportion.planner.stages.groups import Group, common_formats, group_link
from apportion.types.cluster import Cluster, Device
from apportion.types.model import LayerSpec
from apportion.types.units import FORMAT_BYTES, KV_BITS

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of groups: `parts[part, group]` of all layers of a sort, and of the head; `once[group]` of any stage."""

    parts: FloatArray
    once: FloatArray


class GroupWork:
    """`prefill` of one prompt in a chunk size, beside so many sequences' tokens, `decode` of a step of so many."""

    def __init__(self, problem: Problem, groups: Sequence[Group]) -> None:
        self.problem = problem
        self.groups = groups
        self._layers = layer_counts(problem.model.layers)
        self._activations = least_activations(problem)
        self._kv = least_kv(problem)

    def prefill(self, chunk_tokens: int, beside: int) -> Work:
        return self._work(self._steps(chunk_tokens, 1, beside).prefill)

    def decode(self, sequences: int) -> Work:
        return self._work((self._steps(self.problem.capacity.chunk_tokens, sequences, 0).decode,))

    def hop(
        self, src_host: str, dst_host: str, chunk_tokens: int, sequences: int, beside: int
    ) -> Timing | None:
        """Hidden states between two hosts, None where there is no link."""
        link = host_link(self.problem.cluster, src_host, dst_host)
        steps = self._steps(chunk_tokens, sequences, beside)
        return link and hop_timing(self.problem.model, link, 1, steps, self._activations)

    def _steps(self, chunk_tokens: int, sequences: int, beside: int) -> Steps:
        return workload_steps(self.problem.workload, chunk_tokens, sequences, beside=beside)

    def _work(self, steps: Sequence[AnyStep]) -> Work:
        alone: dict[str, FloatArray] = {}
        for group in self.groups:
            for device in group.devices:
                if device.id not in alone:
                    alone[device.id] = np.array([self._alone(device, step) for step in steps])
        parts = [self._parts(group, steps, alone) for group in self.groups]
        once = [len(steps) * max(device.step_overhead_s for device in group.devices) for group in self.groups]
        return Work(np.array(parts).T, np.array(once))

    def _alone(self, device: Device, step: AnyStep) -> list[float]:
        """One device's whole attention and FFN by sort of layer, and head, each in the best format for it."""
        names = common_formats(self.problem.weight_formats, (device,))
        formats = [Formats(weights=name, activations=self._activations, kv=self._kv) for name in names]
        model = self.problem.model

        def attention(layer: LayerSpec) -> float:
            return min(attention_s(device, model, layer, model.kv_heads, step, one) for one in formats)

        def ffn(layer: LayerSpec) -> float:
            return min(model.ffn_columns * ffn_column_s(device, layer, step.tokens, one) for one in formats)

        head_s = min(model.vocab_rows * head_row_s(device, model, step.sampled_rows, one) for one in formats)
        parts = [count * phase(layer) for layer, count in self._layers for phase in (attention, ffn)]
        return [*parts, head_s]

    def _parts(self, group: Group, steps: Sequence[AnyStep], alone: dict[str, FloatArray]) -> list[float]:
        """`alone[device]` is [step, attention and FFN of each sort of layer, then the head]."""
        with np.errstate(divide="ignore"):
            shared = 1 / np.sum([1 / alone[device.id] for device in group.devices], axis=0)
        seconds: FloatArray = shared.sum(axis=0)
        overhead_s = len(steps) * max(device.layer_overhead_s for device in group.devices)
        beside_s = overhead_s + sum(self._reductions_s(group, step) for step in steps)
        layers = [
            float(seconds[2 * number] + seconds[2 * number + 1]) + count * beside_s
            for number, (_, count) in enumerate(self._layers)
        ]
        return [*layers, float(seconds[-1])]

    def _reductions_s(self, group: Group, step: AnyStep) -> float:
        """Of one layer."""
        link = group_link(self.problem, group)
        if link is None:
            return 0.0
        sizes = layer_reductions(self.problem.model, FORMAT_BYTES[self._activations])
        return sum(reduction_s(link, group.size, step.tokens * size) for size in sizes)


def least_activations(problem: Problem) -> str:
    """The smallest that any of the cluster's devices may have in a replica."""
    clusters = [Cluster(devices=(device,), links=()) for device in problem.cluster.devices]
    names = {activation_format(problem.model, one, problem.weight_formats) for one in clusters}
    return min({*names, problem.activation_format}, key=lambda name: FORMAT_BYTES[name])


def least_kv(problem: Problem) -> str:
    """Likewise of keys and values."""
    least = least_activations(problem)
    clusters = [Cluster(devices=(device,), links=()) for device in problem.cluster.devices]
    names = {kv_format(one, problem.workload, problem.weight_formats, least) for one in clusters}
    return min({*names, problem.kv_format}, key=lambda name: KV_BITS[name])
