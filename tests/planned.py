"""Models and clusters of realistic proportions for the planner's tests."""

from collections.abc import Sequence

from apportion.types.cluster import Cluster, Device, Link
from apportion.types.model import LayerSpec, ModelSpec, Parameters
from apportion.types.workload import Objective, Workload

GIB = 2**30


def llama(num_layers: int = 12, hidden: int = 2048) -> ModelSpec:
    layer = LayerSpec(
        per_kv_head=Parameters(elements=hidden * 64 * 10, rows=64 * 6, others=0),
        per_ffn_column=Parameters(elements=3 * hidden, rows=2, others=0),
        replicated=Parameters(elements=0, rows=2 * hidden, others=2 * hidden),
        window_tokens=None,
        num_experts=0,
        experts_per_token=0,
    )
    return ModelSpec(
        name="llama",
        family="llama",
        fingerprint="f",
        layers=(layer,) * num_layers,
        hidden_size=hidden,
        q_heads=32,
        kv_heads=8,
        head_dim=64,
        ffn_columns=8192,
        vocab_rows=128256,
        tied_embeddings=True,
        max_context_tokens=8192,
        checkpoint_format="bf16",
    )


def cpu(name: str, gib: float, speed: float = 1.0, host: str = "local") -> Device:
    return Device(
        id=name,
        host=host,
        kind="cpu",
        torch_device="cpu",
        memory_bytes=round(gib * GIB),
        reserved_bytes=0,
        mem_bytes_per_s=16e9 * speed,
        flops_per_s={"fp32": 75e9 * speed, "bf16": 75e8 * speed},
        layer_overhead_s=3e-4 / speed,
        step_overhead_s=3e-4 / speed,
        num_threads=1,
        host_cores=None,
        speed=speed,
        source="measured",
    )


def cluster(devices: Sequence[Device], *, joined: bool = True) -> Cluster:
    """Hosts are joined by 1 Gbit, or not at all."""
    hosts = list(dict.fromkeys(device.host for device in devices))
    inside = [Link(src=host, dst=host, latency_s=6e-5, bytes_per_s=1.5e9) for host in hosts]
    across = [
        Link(src=a, dst=b, latency_s=3e-4, bytes_per_s=1.25e8)
        for a in hosts
        for b in hosts
        if a < b and joined
    ]
    return Cluster(devices=tuple(devices), links=(*inside, *across))


def workload(objective: Objective = "latency", concurrency: int = 1, context: int = 2048) -> Workload:
    return Workload(
        prompt_tokens=512,
        output_tokens=128,
        concurrency=concurrency,
        max_context_tokens=context,
        objective=objective,
    )
