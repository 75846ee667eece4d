"""Where layers may be streamed: equal to brute force over orders, groups, ranges, shares and every number of streamed
layers. Two sorts of layers, of which a member's part may be larger of one, another's of the other."""

from dataclasses import replace
from itertools import product
from math import inf
from random import Random

import pytest
from enumerated import every_microbatches
from property.test_planner_brute_force import BruteForce, compositions, dominates

from apportion.cost.estimate import stage_timing
from apportion.cost.memory import stages_memory
from apportion.cost.objective import Timing
from apportion.cost.streaming import evenly_streamed
from apportion.cost.workspace import CPU_RUNTIME_BYTES, GPU_RUNTIME_BYTES
from apportion.planner.bounds.bound import certify
from apportion.planner.divide import search
from apportion.planner.problem import Problem, make_problem
from apportion.planner.stages import options
from apportion.types.cluster import Cache, Cluster, Device, Link
from apportion.types.model import LayerSpec, ModelSpec, Parameters
from apportion.types.workload import Workload


def random_problem(seed: int) -> Problem:
    """Every other one with groups."""
    random = Random(seed)
    kv_heads = random.choice([2, 3]) if seed % 2 else 1
    layers = [
        LayerSpec(
            per_kv_head=Parameters(elements=random.choice([1, 4]) * 100_000, rows=64, others=0),
            per_ffn_column=Parameters(elements=random.choice([3, 8]) * 10_000, rows=16, others=0),
            replicated=Parameters(elements=0, rows=64, others=128),
            window_tokens=random.choice([None, 8]),
            num_experts=0,
            experts_per_token=0,
        )
        for _ in range(2)
    ]
    model = ModelSpec(
        name="tiny",
        family="llama",
        fingerprint="",
        layers=tuple(random.choice(layers) for _ in range(random.randint(3, 7 if kv_heads == 1 else 5))),
        hidden_size=64,
        q_heads=2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=32,
        ffn_columns=3,
        vocab_rows=30,
        tied_embeddings=random.random() < 0.5,
        max_context_tokens=64,
        checkpoint_format="bf16",
    )
    workload = Workload(
        prompt_tokens=random.choice([4, 40]),
        output_tokens=8,
        concurrency=random.choice([1, 4]),
        max_context_tokens=64,
        objective=random.choice(["latency", "throughput"]),
    )
    kinds = random.choice([("cpu",), ("cuda",), ("cpu", "cuda")])
    devices = tuple(
        _device(random, f"d{i}", random.choice(kinds)) for i in range(random.randint(1 + seed % 2, 3))
    )
    link = Link(src="h", dst="h", latency_s=random.choice([1e-5, 1e-3]), bytes_per_s=1e8)
    cluster = Cluster(devices=devices, links=(link,))
    weights = random.choice([("fp32",), ("bf16",), ("int8",), ("bf16", "int8")])
    problem = make_problem(model, cluster, workload, weights, 16)
    return replace(problem, streaming=True)


def _device(random: Random, name: str, kind: str) -> Device:
    runtime_bytes = CPU_RUNTIME_BYTES if kind == "cpu" else GPU_RUNTIME_BYTES
    return Device(
        id=name,
        host="h",
        kind="cpu" if kind == "cpu" else "cuda",
        torch_device=kind,
        memory_bytes=runtime_bytes + round(10 ** random.uniform(6.25, 6.75)),
        reserved_bytes=0,
        mem_bytes_per_s=10 ** random.uniform(9, 10.5),
        flops_per_s=dict.fromkeys(("fp32", "bf16", "int8"), 10 ** random.uniform(10, 12)),
        layer_overhead_s=random.choice([0.0, 1e-4]),
        step_overhead_s=1e-4,
        num_threads=1,
        host_cores=None,
        speed=1.0,
        source="datasheet",
        host_bytes_per_s=random.choice([None, 10 ** random.uniform(9, 11)]),
        stream_bytes_per_s=random.choice([None, *[10 ** random.uniform(8, 10.5)] * 4]),
        stream_from=random.choice(["host memory", "disk"]) if kind == "cpu" else "host memory",
        cache=Cache(
            num_bytes=round(10 ** random.uniform(5, 6.5)),
            read_bytes_per_s=10 ** random.uniform(10, 11),
            copied_bytes_per_s=10 ** random.uniform(9, 10.5),
        )
        if kind == "cpu" and random.random() < 0.6
        else None,
    )


class StreamingBruteForce(BruteForce):
    def find_options(self, group, start, stop) -> list[Timing]:
        """Of every number of streamed layers with all shares in every format."""
        model = self.model
        most = stop - start if all(device.stream_bytes_per_s for device in group) else 0
        timings: list[Timing] = []
        for heads, columns, weight_format, count in product(
            compositions(model.kv_heads, len(group)),
            compositions(model.ffn_columns, len(group)),
            self.problem.weight_formats,
            range(most + 1),
        ):
            stage = replace(
                self.stage(group, start, stop, heads, columns, weight_format),
                streamed_layers=evenly_streamed(model, start, stop, count),
            )
            if self.fits(stage):
                timings.append(stage_timing(model, self.cluster, stage, self.steps))
        return [t for t in set(timings) if not any(dominates(other, t) for other in timings)]


def brute_force(problem: Problem) -> float:
    numbers = every_microbatches(problem.workload, len(problem.cluster.devices))
    return min(StreamingBruteForce(problem, number).best_of_states() for number in numbers)


SORTS_IN_ANOTHER_ORDER = 159
"""A group of three holds layers of both sorts, first that which is second in the model."""
SEEDS = pytest.mark.parametrize(
    "seeds",
    [range(60), pytest.param(range(60, 1000), marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])],
    ids=["few", "many"],
)


@SEEDS
def test_equal_to_brute_force(seeds: range):
    """Of single devices the bound meets it: there is a single way to share, so it is exact."""
    streamed = groups = infeasible = 0
    for seed in seeds:
        problem = random_problem(seed)
        least, found = brute_force(problem), search(problem)
        if found is None:
            assert least == inf, seed
            infeasible += 1
            continue
        assert found.value == pytest.approx(least, rel=1e-9), seed
        streaming = [stage for stage in found.stages if stage.streamed_layers]
        streamed += len(streaming) > 0
        groups += any(stage.split.size > 1 for stage in streaming)
        memory = stages_memory(problem.model, problem.cluster, found.stages, problem.capacity)
        for device_id, used in memory.items():
            assert used.total_bytes <= problem.cluster.device(device_id).memory_bytes
        certificate = certify([problem], found.value)
        assert certificate.lower_bound <= found.value
        assert certificate.gap < 1e-6 or problem.model.kv_heads > 1, seed
    assert streamed > len(seeds) // 5
    assert groups > len(seeds) // 60
    assert infeasible > 0


@SEEDS
def test_shares_that_are_not_numbered(seeds: range, monkeypatch: pytest.MonkeyPatch):
    """The bound holds for all shares; what is found from a pool of them is real."""
    monkeypatch.setattr(options, "MAX_SHARES", 0)
    for seed in (SORTS_IN_ANOTHER_ORDER, *(seed for seed in seeds if seed % 4 == 1)):
        problem = random_problem(seed)
        least, found = brute_force(problem), search(problem)
        if least < inf:
            assert certify([problem], 1.5 * least).lower_bound <= least * (1 + 1e-9), seed
        if found is not None:
            assert found.value >= least * (1 - 1e-9), seed
            memory = stages_memory(problem.model, problem.cluster, found.stages, problem.capacity)
            for device_id, used in memory.items():
                assert used.total_bytes <= problem.cluster.device(device_id).memory_bytes
