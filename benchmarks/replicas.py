"""How long it takes to plan replicas, what they gain over one pipeline, and how far from proven optimal they are.

    python benchmarks/replicas.py [--cases 4]

Seconds are of one core's processor time, the certificate included; the last line is JSON.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from time import process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from apportion.catalog.cluster_text import parse_devices
from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.planner.build import make_plan
from apportion.planner.replicas.build import make_replicated_plan
from apportion.types.workload import Workload

CASES = [
    ("qwen3-4b", "tower: 4x rtx-3060-12gb", 32),
    ("qwen3-4b", "a: 2x rtx-3060-12gb; b: 2x rtx-3060-12gb; link a-b 1Gbit 0.3ms", 32),
    (
        "qwen3-4b",
        "a: rtx-4090; b: rtx-3090; c: rtx-4060-ti-16gb",
        16,
    ),
    ("llama-3.1-8b", "a: rtx-4090 + 2x rtx-3060-12gb; b: rtx-3090 + rtx-3060-12gb; link a-b 1Gbit 0.3ms", 16),
    ("llama-3.1-8b", "tower: 8x rtx-3090", 64),
    (
        "llama-3.1-8b",
        "a: rtx-4090 + rtx-3090 + rtx-3060-12gb; b: rtx-4080 + rtx-4070; link a-b 1Gbit 0.3ms",
        16,
    ),
    ("qwen3-4b", "; ".join(f"h{i}: 8x rtx-3060-12gb" for i in range(8)), 256),
]


@dataclass(frozen=True)
class Measured:
    model: str
    devices: str
    concurrency: int
    single_s: float
    replicas_s: float
    replicas: list[int]
    """Sequences of each."""
    gain: float
    """Tokens/s over those of one pipeline."""
    gap: float


def linked(devices: str) -> str:
    """With 10 Gbit/s between all hosts where no link is named."""
    hosts = [part.split(":")[0].strip() for part in devices.split(";") if ":" in part]
    if "link" in devices:
        return devices
    pairs = [(a, b) for i, a in enumerate(hosts) for b in hosts[i + 1 :]]
    return "; ".join([devices, *(f"link {a}-{b} 10Gbit 0.1ms" for a, b in pairs)])


def measure(name: str, devices: str, concurrency: int) -> Measured:
    model = read_model_spec(resolve_model(name, weights=False))
    cluster = parse_devices(linked(devices), lambda _: [])
    workload = Workload(
        prompt_tokens=512,
        output_tokens=128,
        concurrency=concurrency,
        max_context_tokens=2048,
        objective="throughput",
    )
    start = process_time()
    single = make_plan(model, cluster, workload, ("bf16",))
    between = process_time()
    plan = make_replicated_plan(model, cluster, workload, ("bf16",), None)
    return Measured(
        model=name,
        devices=devices,
        concurrency=concurrency,
        single_s=round(between - start, 2),
        replicas_s=round(process_time() - between, 2),
        replicas=[replica.workload.concurrency for replica in plan.replicas],
        gain=round(single.certificate.value / plan.certificate.value, 3),
        gap=plan.certificate.gap,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=len(CASES))
    results: list[Measured] = []
    for case in CASES[: parser.parse_args().cases]:
        found = measure(*case)
        results.append(found)
        print(
            f"{found.model} on {found.devices}, {found.concurrency} sequences: one pipeline {found.single_s:.1f} s, "
            f"replicas {found.replicas_s:.1f} s: {found.replicas}, {found.gain:.2f}x, gap {found.gap:.1e}",
            flush=True,
        )
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
