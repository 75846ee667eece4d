"""How long planning takes, and how far from proven optimal the plans are: 8 and 64 unequal GPUs, 80 layers.

    python benchmarks/planner_scale.py [--seed 0]

Seconds are of one core's processor time, search and certificate; the last line is JSON.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from random import Random
from time import perf_counter, process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from apportion.cost.estimate import objective_value
from apportion.planner.bounds.bound import certify
from apportion.planner.divide import search
from apportion.planner.problem import make_problem
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.model import LayerSpec, ModelSpec, Parameters
from apportion.types.workload import Objective, Workload

GIB = 2**30
KINDS = {  # datasheet: GiB, GB/s, TFLOP/s in fp32
    "4090": (24, 1008, 82.6),
    "3090": (24, 936, 35.6),
    "4060ti": (16, 288, 22.1),
    "3060": (12, 360, 12.7),
    "2080ti": (11, 616, 13.4),
    "3070": (8, 448, 20.3),
}
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Measured:
    case: str
    objective: Objective
    search_s: float
    certificate_s: float
    wall_s: float
    value_s: float
    gap: float
    method: str


def gpu(kind: str, name: str, host: str, memory_factor: float, speed: float) -> Device:
    gib, gigabytes_per_s, teraflops = KINDS[kind]
    return Device(
        id=name,
        host=host,
        kind="cuda",
        torch_device="cuda:0",
        memory_bytes=int(gib * memory_factor * GIB),
        reserved_bytes=0,
        mem_bytes_per_s=0.8 * gigabytes_per_s * 1e9 * speed,
        flops_per_s={"bf16": 0.6 * teraflops * 1e12 * speed},
        layer_overhead_s=3e-5,
        step_overhead_s=2e-4,
        num_threads=1,
        host_cores=None,
        speed=1.0,
        source="datasheet",
    )


def model(num_layers: int = 80) -> ModelSpec:
    """Of the shape of Llama 3 70B."""
    hidden = 8192
    layer = LayerSpec(
        per_kv_head=Parameters(elements=hidden * 128 * 18, rows=128 * 10, others=0),
        per_ffn_column=Parameters(elements=3 * hidden, rows=2, others=0),
        replicated=Parameters(elements=0, rows=2 * hidden, others=2 * hidden),
        window_tokens=None,
        num_experts=0,
        experts_per_token=0,
    )
    return ModelSpec(
        name="70b",
        family="llama",
        fingerprint="",
        layers=(layer,) * num_layers,
        hidden_size=hidden,
        q_heads=64,
        kv_heads=8,
        head_dim=128,
        ffn_columns=28672,
        vocab_rows=128256,
        tied_embeddings=False,
        max_context_tokens=8192,
        checkpoint_format="bf16",
    )


def joined(devices: list[Device]) -> Cluster:
    """PCIe inside a host, 10 Gbit/s between them."""
    hosts = list(dict.fromkeys(device.host for device in devices))
    inside = [Link(src=host, dst=host, latency_s=2e-5, bytes_per_s=1e10) for host in hosts]
    across = [Link(src=a, dst=b, latency_s=1e-4, bytes_per_s=1.25e9) for a in hosts for b in hosts if a < b]
    return Cluster(devices=tuple(devices), links=(*inside, *across))


def eight(random: Random) -> Cluster:
    """Eight devices, no two alike, two on a host."""
    names = [*KINDS, *random.sample(list(KINDS), 2)]
    random.shuffle(names)
    return joined(
        [
            gpu(kind, f"g{i}", f"h{i // 2}", random.uniform(1.6, 2.2), random.uniform(0.8, 1.0))
            for i, kind in enumerate(names)
        ]
    )


def sixty_four(random: Random) -> Cluster:
    """Eight hosts of eight devices, of two kinds each, six kinds in all."""
    pairs = [random.sample(list(KINDS), 2) for _ in range(8)]
    pairs[0], pairs[1], pairs[2] = (list(KINDS)[i : i + 2] for i in (0, 2, 4))
    return joined(
        [
            gpu(pair[i // 4], f"g{host}{i}", f"h{host}", 0.9, 1.0)
            for host, pair in enumerate(pairs)
            for i in range(8)
        ]
    )


def measure(case: str, cluster: Cluster, objective: Objective) -> Measured:
    workload = Workload(
        prompt_tokens=512, output_tokens=128, concurrency=8, max_context_tokens=2048, objective=objective
    )
    problem = make_problem(model(), cluster, workload, ("bf16",), CHUNK_TOKENS)
    wall, start = perf_counter(), process_time()
    found = search(problem)
    assert found is not None
    searched = process_time()
    value = objective_value(
        problem.model,
        cluster,
        workload,
        found.stages,
        chunk_tokens=CHUNK_TOKENS,
        microbatches=found.microbatches,
    )
    certificate = certify([problem], value)
    return Measured(
        case=case,
        objective=objective,
        search_s=round(searched - start, 3),
        certificate_s=round(process_time() - searched, 3),
        wall_s=round(perf_counter() - wall, 3),
        value_s=value,
        gap=certificate.gap,
        method=certificate.method,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    results: list[Measured] = []
    for case, make in (("8 devices, 4 hosts", eight), ("64 devices, 8 hosts, 6 kinds", sixty_four)):
        cluster = make(Random(seed))
        for objective in ("latency", "throughput"):
            found = measure(case, cluster, objective)
            results.append(found)
            print(
                f"{case}, {objective}: search {found.search_s:.2f} s, certificate {found.certificate_s:.2f} s, "
                f"wall {found.wall_s:.2f} s, gap {found.gap:.1e} ({found.method})",
                flush=True,
            )
    print(json.dumps({"seed": seed, "cases": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
