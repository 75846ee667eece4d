"""Where layers may be streamed: equal to brute force over orders, ranges and every number of streamed layers.

Models of one KV head, so that there are no groups; two sorts of layers of different sizes.
"""

from dataclasses import replace
from itertools import combinations, pairwise, permutations, product
from math import inf
from random import Random

import pytest

from apportion.cost.estimate import entry_timing, exit_timing, hop_timing, stage_timing
from apportion.cost.memory import stages_memory
from apportion.cost.objective import Timing
from apportion.cost.streaming import evenly_streamed
from apportion.planner.bounds.bound import certify
from apportion.planner.divide import search
from apportion.planner.problem import Problem, make_problem, microbatch_candidates
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.model import LayerSpec, ModelSpec, Parameters
from apportion.types.plan import Stage, TensorSplit
from apportion.types.workload import Workload

LINK = Link(src="h", dst="h", latency_s=1e-3, bytes_per_s=1e8)


def random_problem(seed: int) -> Problem:
    random = Random(seed)
    layers = [
        LayerSpec(
            per_kv_head=Parameters(elements=random.choice([1, 4]) * 100_000, rows=64, others=0),
            per_ffn_column=Parameters(elements=50_000, rows=16, others=0),
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
        layers=tuple(random.choice(layers) for _ in range(random.randint(3, 7))),
        hidden_size=64,
        q_heads=2,
        kv_heads=1,
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
        concurrency=random.choice([1, 3]),
        max_context_tokens=64,
        objective=random.choice(["latency", "throughput"]),
    )
    kinds = random.choice([("cpu",), ("cuda",), ("cpu", "cuda")])
    devices = tuple(_device(random, f"d{i}", random.choice(kinds)) for i in range(random.randint(1, 3)))
    cluster = Cluster(devices=devices, links=(LINK,))
    weights = random.choice([("fp32",), ("bf16",), ("int8",), ("bf16", "int8")])
    problem = make_problem(model, cluster, workload, weights, 16)
    return replace(problem, streaming=True)


def _device(random: Random, name: str, kind: str) -> Device:
    return Device(
        id=name,
        host="h",
        kind="cpu" if kind == "cpu" else "cuda",
        torch_device=kind,
        memory_bytes=3 * 2**20 + round(10 ** random.uniform(6.4, 6.8)),
        reserved_bytes=0,
        mem_bytes_per_s=10 ** random.uniform(9, 11),
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
    )


def brute_force(problem: Problem) -> float:
    candidates = microbatch_candidates(problem.workload, len(problem.cluster.devices))
    return min(_least(problem, microbatches) for microbatches in candidates)


def _least(problem: Problem, microbatches: int) -> float:
    goal, steps = problem.goal(microbatches), problem.steps(microbatches)
    model, num_layers = problem.model, problem.model.num_layers
    hop = hop_timing(model, LINK, 1, steps, problem.activation_format)
    ends = [entry_timing(LINK, 1, steps), exit_timing(LINK, steps)]
    timings = {
        (device.id, start, stop): _timings(problem, device, start, stop, steps)
        for device in problem.cluster.devices
        for start, stop in combinations(range(num_layers + 1), 2)
    }
    least = inf
    for size in range(1, min(len(problem.cluster.devices), num_layers) + 1):
        for order in permutations(problem.cluster.devices, size):
            for cuts in combinations(range(1, num_layers), size - 1):
                ranges = pairwise((0, *cuts, num_layers))
                stages = [timings[device.id, *part] for device, part in zip(order, ranges, strict=True)]
                for chosen in product(*stages):
                    least = min(least, goal.value([*chosen, *ends, *[hop] * (size - 1)]))
    return least


def _timings(problem: Problem, device: Device, start: int, stop: int, steps) -> list[Timing]:
    """Of every number of streamed layers in every format."""
    model = problem.model
    most = stop - start if device.stream_bytes_per_s else 0
    found: list[Timing] = []
    for count, weight_format in product(range(most + 1), problem.weight_formats):
        stage = Stage(
            layer_start=start,
            layer_stop=stop,
            split=TensorSplit(
                device_ids=(device.id,),
                q_heads=(model.q_heads,),
                kv_heads=(model.kv_heads,),
                ffn_columns=(model.ffn_columns,),
                vocab_rows=(model.vocab_rows,),
            ),
            weight_format=weight_format,
            activation_format=problem.activation_format,
            kv_format=problem.kv_format,
            has_embedding=start == 0,
            has_head=stop == model.num_layers,
            streamed_layers=evenly_streamed(model, start, stop, count),
        )
        memory = stages_memory(model, problem.cluster, [stage], problem.capacity)[device.id]
        if memory.total_bytes <= device.memory_bytes:
            found.append(stage_timing(model, problem.cluster, stage, steps))
    return found


@pytest.mark.parametrize(
    "seeds",
    [range(60), pytest.param(range(60, 1000), marks=pytest.mark.nightly)],
    ids=["few", "many"],
)
def test_equal_to_brute_force(seeds: range):
    """And the bound meets it: there is a single way to share, so it is exact."""
    streamed = infeasible = 0
    for seed in seeds:
        problem = random_problem(seed)
        least, found = brute_force(problem), search(problem)
        if found is None:
            assert least == inf, seed
            infeasible += 1
            continue
        assert found.value == pytest.approx(least, rel=1e-9), seed
        streamed += any(stage.streamed_layers for stage in found.stages)
        memory = stages_memory(problem.model, problem.cluster, found.stages, problem.capacity)
        for device_id, used in memory.items():
            assert used.total_bytes <= problem.cluster.device(device_id).memory_bytes
        certificate = certify([problem], found.value)
        assert certificate.lower_bound <= found.value
        assert certificate.gap < 1e-6, seed
    assert streamed > len(seeds) // 5
    assert infeasible > 0
