"""Mixtures of experts in llama.cpp: the experts of the first layers in the main host's memory, all else on its GPUs.

A plan of ours gives a device whole layers, so this is a search of its own, exact for GPUs in any order of up to
`MAX_ORDERED`: for every number of layers whose experts stay in host memory the cheapest cut of the layers into one run
a GPU, by dynamic programming over GPUs. Batches go through the layers one at a time, so seconds add up.

Looked at: common/arg.cpp and PR 15077 (`--n-cpu-moe N`: the first N layers' `ffn_*_exps`; other tensors by
`--override-tensor`), ggml-backend.cpp and tools/server/README.md (`--op-offload`, the default: for batches of 32 tokens
and more, weights in host memory are copied to the GPU and multiplied there).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from apportion.cost.estimate import Steps, workload_steps
from apportion.cost.formats import Formats, parameters_bytes, vocab_row_bytes
from apportion.cost.memory import Capacity, kv_cache_bytes, shard_memory
from apportion.cost.roofline import AnyStep, attention_s, ffn_column_s, head_row_s
from apportion.cost.shard import Shard, layer_counts
from apportion.cost.traffic import coordinator_host, host_link
from apportion.types.cluster import Cluster, Device
from apportion.types.constraints import UNCONSTRAINED, Constraints
from apportion.types.model import LayerSpec, ModelSpec
from apportion.types.workload import Workload

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Seconds = Callable[[AnyStep], float]
MAX_ORDERED = 4
"""So many GPUs are tried in every order; more, in the cluster's."""
COPIED_TOKENS = 32
"""Of a batch, from which weights in host memory are copied to the GPU (ggml's `--op-offload`)."""
STATE_BYTES = 4
"""Of an element of hidden states that go from GPU to CPU and back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSplit:
    """GPUs with layers `[start, stop)` each; of the first `num_on_cpu` layers the experts are on `cpu`."""

    runs: tuple[tuple[Device, int, int], ...]
    cpu: Device
    num_on_cpu: int
    needed_bytes: dict[str, int]
    """By device, with its reserve."""
    tpot_s: float
    tokens_per_s: float

    @property
    def statement(self) -> str:
        runs = ", ".join(f"layers {start}–{stop - 1} on {gpu.id}" for gpu, start, stop in self.runs)
        return f"experts of the first {self.num_on_cpu} layers in the memory of {self.cpu.id}, all else on GPUs: {runs}"


def best_expert_split(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    formats: Formats,
    capacity: Capacity,
    constraints: Constraints = UNCONSTRAINED,
) -> ExpertSplit | None:
    """None where there are no experts, no GPU or no CPU on the main host, or nothing fits or keeps the constraints."""
    main = coordinator_host(cluster)
    gpus = [device for device in cluster.devices if device.host == main and device.kind != "cpu"]
    cpus = [device for device in cluster.devices if device.host == main and device.kind == "cpu"]
    if not (gpus and cpus) or all(layer.num_experts == 0 for layer in model.layers):
        return None
    if not _can_keep(constraints, cluster, [gpu.id for gpu in gpus], cpus[0].id):
        return None
    search = _Search(model, cluster, workload, formats, capacity, cpus[0], constraints)
    return min(search.splits(gpus), key=lambda split: -split.tokens_per_s, default=None)


def _can_keep(constraints: Constraints, cluster: Cluster, gpus: Sequence[str], cpu: str) -> bool:
    """Whole layers are on one GPU of the main host each; a CPU takes part with experts alone."""
    named = {device.id for device in cluster.devices} if constraints.use_all else constraints.used
    return named <= {*gpus, cpu} and all(
        len(one.device_ids) == 1 and one.device_ids[0] in gpus for one in constraints.tied
    )


class _Search:
    def __init__(
        self,
        model: ModelSpec,
        cluster: Cluster,
        workload: Workload,
        formats: Formats,
        capacity: Capacity,
        cpu: Device,
        constraints: Constraints,
    ) -> None:
        self.constraints = constraints
        self.model, self.cluster, self.workload, self.formats, self.cpu = (
            model,
            cluster,
            workload,
            formats,
            cpu,
        )
        self.capacity = capacity
        self.steps: Steps = workload_steps(workload, capacity.chunk_tokens, workload.concurrency)
        self.whole = _shard(model, model.layers, formats)
        self.expert_bytes = np.array([_expert_bytes(model, layer, formats) for layer in model.layers])
        self.layer_bytes = np.array([self._layer_bytes(layer) for layer in model.layers])
        self.head_bytes = model.vocab_rows * vocab_row_bytes(
            model, formats, has_embedding=False, has_head=True
        )
        self.embedding_bytes = model.vocab_rows * vocab_row_bytes(
            model, formats, has_embedding=True, has_head=False
        )

    def _layer_bytes(self, layer: LayerSpec) -> int:
        shard = _shard(self.model, [layer], self.formats)
        return shard.layer_bytes(layer) + kv_cache_bytes(self.model, shard, self.capacity)

    def splits(self, gpus: Sequence[Device]) -> Iterator[ExpertSplit]:
        """The best of every number of layers and order."""
        orders = list(permutations(gpus)) if len(gpus) <= MAX_ORDERED else [tuple(gpus)]
        beside = {gpu.id: self._beside_bytes(gpu) for gpu in gpus}
        seconds = {gpu.id: self._layer_seconds(gpu) for gpu in gpus}
        for number in range(1, self.model.num_layers + 1):
            on_cpu = np.where(np.arange(self.model.num_layers) < number, self.expert_bytes, 0)
            if self.expert_bytes[number - 1] == 0 or not self._cpu_holds(int(on_cpu.sum())):
                continue
            for order in orders:
                found = self._cut(order, number, on_cpu, beside, seconds)
                if found is not None:
                    yield self._split(found, number, on_cpu, beside)

    def _cpu_holds(self, expert_bytes: int) -> bool:
        return expert_bytes + self.embedding_bytes <= self.cpu.usable_bytes

    def _beside_bytes(self, gpu: Device) -> int:
        """Workspace and messages: at most what the whole model asks for."""
        memory = shard_memory(self.model, self.whole, self.capacity, gpu)
        return memory.workspace_bytes + memory.buffer_bytes

    def _layer_seconds(self, gpu: Device) -> FloatArray:
        """[where the experts are, layer], of all steps of the workload."""
        known = {
            layer: [
                self._all_steps(lambda step, layer=layer: self._on_gpu_s(gpu, layer, step)),
                self._all_steps(lambda step, layer=layer: self._on_cpu_s(gpu, layer, step)),
            ]
            for layer in set(self.model.layers)
        }
        return np.array([known[layer] for layer in self.model.layers]).T

    def _all_steps(self, seconds: Seconds) -> float:
        """Prompts one after the other, then the tokens of all sequences together."""
        prefill_s = sum(seconds(step) for step in self.steps.prefill)
        decode_s = seconds(self.steps.decode)
        return self.workload.concurrency * prefill_s + (self.workload.output_tokens - 1) * decode_s

    def _attention_s(self, gpu: Device, layer: LayerSpec, step: AnyStep) -> float:
        held = self.model.kv_heads
        return attention_s(gpu, self.model, layer, held, step, self.formats) + gpu.layer_overhead_s

    def _ffn_s(self, device: Device, layer: LayerSpec, step: AnyStep) -> float:
        return self.model.ffn_columns * ffn_column_s(device, layer, step.tokens, self.formats)

    def _on_gpu_s(self, gpu: Device, layer: LayerSpec, step: AnyStep) -> float:
        return self._attention_s(gpu, layer, step) + self._ffn_s(gpu, layer, step)

    def _on_cpu_s(self, gpu: Device, layer: LayerSpec, step: AnyStep) -> float:
        """With the layer's experts in host memory."""
        if layer.num_experts == 0:
            return self._on_gpu_s(gpu, layer, step)
        attention = self._attention_s(gpu, layer, step)
        if gpu.stream_bytes_per_s is None:
            return attention + self._ffn_s(self.cpu, layer, step) + self.cpu.layer_overhead_s
        if step.tokens >= COPIED_TOKENS:
            copied_s = _expert_bytes(self.model, layer, self.formats) / gpu.stream_bytes_per_s
            return attention + copied_s + self._ffn_s(gpu, layer, step)
        states_s = 2 * step.tokens * self.model.hidden_size * STATE_BYTES / gpu.stream_bytes_per_s
        return attention + states_s + self._ffn_s(self.cpu, layer, step) + self.cpu.layer_overhead_s

    def _ends_s(self, gpu: Device) -> tuple[float, float, float]:
        """Of each run of layers, of the head, and of the hop from another GPU."""
        model = self.model
        head = self._all_steps(
            lambda step: model.vocab_rows * head_row_s(gpu, model, step.sampled_rows, self.formats)
        )
        link = host_link(self.cluster, gpu.host, gpu.host)
        hop = 0.0
        if link is not None:
            hidden_bytes = model.hidden_size * self.formats.activation_bytes
            hop = self._all_steps(lambda step: link.hop_seconds(step.tokens * hidden_bytes))
        return self._all_steps(lambda _: gpu.step_overhead_s), head, hop

    def _may_hold(self, gpu: Device) -> BoolArray:
        """[start, stop]: a run of layers that keeps what is said of this GPU."""
        stops = np.arange(self.model.num_layers + 1)
        start, stop = stops[:, None], stops[None, :]
        held = start < stop
        for one in self.constraints.tied:
            if gpu.id in one.device_ids:
                held = held & (start <= one.layer_start) & (one.layer_stop <= stop)
        for one in self.constraints.stages:
            if gpu.id in one.device_ids:
                held = held & (start == one.layer_start) & (one.layer_stop == stop)
        return held

    def _cut(
        self,
        order: Sequence[Device],
        number: int,
        on_cpu: IntArray,
        beside: dict[str, int],
        seconds: dict[str, FloatArray],
    ) -> tuple[float, list[tuple[Device, int, int]]] | None:
        """Seconds of the workload, and the runs; None where nothing fits."""
        layers = self.model.num_layers
        size = np.concatenate([[0], np.cumsum(self.layer_bytes - on_cpu)])
        stops = np.arange(layers + 1)
        best = np.where(stops == 0, 0.0, np.inf)
        chosen: list[IntArray] = []
        for gpu in order:
            on_gpu, with_cpu = seconds[gpu.id]
            time = np.zeros(layers + 1)
            time[1:] = np.cumsum(np.concatenate([with_cpu[:number], on_gpu[number:]]))
            fixed, head, hop = self._ends_s(gpu)
            needed = size[None, :] - size[:, None] + beside[gpu.id] + self.head_bytes * (stops == layers)
            cost = (
                time[None, :] - time[:, None] + fixed + head * (stops == layers) + hop * (stops > 0)[:, None]
            )
            cost = np.where((needed <= gpu.usable_bytes) & self._may_hold(gpu), cost, np.inf)
            ways = best[:, None] + cost
            if self.constraints.use_all or gpu.id in self.constraints.used:
                best = np.full(layers + 1, np.inf)
            after = np.minimum(best, ways.min(axis=0))
            chosen.append(np.where(best <= ways.min(axis=0), stops, ways.argmin(axis=0)))
            best = after
        if not np.isfinite(best[layers]):
            return None
        runs: list[tuple[Device, int, int]] = []
        stop = layers
        for gpu, starts in zip(reversed(order), reversed(chosen), strict=True):
            start = int(starts[stop])
            if start < stop:
                runs.append((gpu, start, stop))
            stop = start
        return float(best[layers]), runs[::-1]

    def _split(
        self,
        found: tuple[float, list[tuple[Device, int, int]]],
        number: int,
        on_cpu: IntArray,
        beside: dict[str, int],
    ) -> ExpertSplit:
        total_s, runs = found
        needed = {
            gpu.id: int((self.layer_bytes - on_cpu)[start:stop].sum())
            + beside[gpu.id]
            + (self.head_bytes if stop == self.model.num_layers else 0)
            + gpu.reserved_bytes
            for gpu, start, stop in runs
        }
        needed[self.cpu.id] = int(on_cpu.sum()) + self.embedding_bytes + self.cpu.reserved_bytes
        return ExpertSplit(
            runs=tuple(runs),
            cpu=self.cpu,
            num_on_cpu=number,
            needed_bytes=needed,
            tpot_s=self._tpot_s(runs, number),
            tokens_per_s=self.workload.concurrency * self.workload.output_tokens / total_s,
        )

    def _tpot_s(self, runs: Sequence[tuple[Device, int, int]], number: int) -> float:
        decode = self.steps.decode
        total = 0.0
        for gpu, start, stop in runs:
            for index in range(start, stop):
                on_layer = self._on_cpu_s if index < number else self._on_gpu_s
                total += on_layer(gpu, self.model.layers[index], decode)
            total += gpu.step_overhead_s
        last = runs[-1][0]
        head_s = head_row_s(last, self.model, decode.sampled_rows, self.formats)
        return total + self.model.vocab_rows * head_s


def _shard(model: ModelSpec, layers: Sequence[LayerSpec], formats: Formats) -> Shard:
    return Shard(
        layers=layer_counts(layers),
        kv_heads=model.kv_heads,
        ffn_columns=model.ffn_columns,
        vocab_rows=model.vocab_rows,
        rank=0,
        size=1,
        formats=formats,
        has_embedding=False,
        has_head=True,
    )


def _expert_bytes(model: ModelSpec, layer: LayerSpec, formats: Formats) -> int:
    """Of all experts of a layer, shared ones too; none of a dense one."""
    if layer.num_experts == 0:
        return 0
    return model.ffn_columns * parameters_bytes(layer.per_ffn_column, formats)
