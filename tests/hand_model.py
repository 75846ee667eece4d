"""A model and devices small enough to cost by hand: 280 parameters a layer, 1120 bytes in fp32."""

from apportion.cost.memory import Capacity
from apportion.cost.roofline import Step
from apportion.types.cluster import Device, DeviceKind, Link
from apportion.types.model import LayerSpec, ModelSpec, Parameters

LAYER = LayerSpec(
    per_kv_head=Parameters(elements=100, rows=20, others=0),
    per_ffn_column=Parameters(elements=12, rows=2, others=0),
    replicated=Parameters(elements=0, rows=8, others=8),
    window_tokens=None,
    num_experts=0,
    experts_per_token=0,
)
LAYER_BYTES = 4 * (2 * 100 + 6 * 12 + 8)
"""280 parameters in fp32."""
MODEL = ModelSpec(
    name="hand",
    family="llama",
    fingerprint="",
    layers=(LAYER, LAYER),
    hidden_size=4,
    q_heads=4,
    kv_heads=2,
    head_dim=5,
    ffn_columns=6,
    vocab_rows=10,
    tied_embeddings=True,
    max_context_tokens=64,
    checkpoint_format="bf16",
)
LINK = Link(src="h", dst="h", latency_s=0.5, bytes_per_s=16.0)
CAPACITY = Capacity(
    num_kv_blocks=2,
    block_tokens=4,
    chunk_tokens=3,
    concurrency=2,
    max_context_tokens=8,
    messages_in_flight=4,
)
DECODE = Step(sequences=1, new_tokens=1, start_tokens=9, sampled_rows=1)


def device(
    name: str, speed: float = 1.0, host_bytes_per_s: float | None = None, kind: DeviceKind = "cpu"
) -> Device:
    """Reads 400 B/s and computes 1000 flop/s at full speed."""
    return Device(
        id=name,
        host="h",
        kind=kind,
        torch_device="cpu",
        memory_bytes=10**8,
        reserved_bytes=0,
        mem_bytes_per_s=400.0 * speed,
        flops_per_s={"fp32": 1000.0 * speed},
        layer_overhead_s=0.25,
        step_overhead_s=0.0,
        num_threads=1,
        host_cores=None,
        speed=speed,
        source="measured",
        host_bytes_per_s=host_bytes_per_s,
    )
