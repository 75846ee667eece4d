"""Time of attention per sequence and layer on one core: the compiled kernels beside one scaled_dot_product_attention
call per sequence, over the pool's layout and over one with a token's heads side by side; one new token each, and a
prefill chunk.

python benchmarks/attention.py
"""

import json
import os
import statistics
import time

import torch

from apportion.model.backend import Backend
from apportion.model.backends.cpu.backend import CpuBackend
from apportion.model.backends.torch.backend import TorchBackend
from apportion.model.kv_pool import PoolTensors
from apportion.model.weights.checkpoint import FORMAT_DTYPES
from apportion.types.request import Chunk, ScheduledBatch

KV_HEADS, GROUP, HEAD_DIM, BLOCK_TOKENS = 8, 2, 64, 16
SCALE = HEAD_DIM**-0.5
POOL_BYTES = 256 * 2**20
"""All layers together, at least: what a layer reads has left the caches when its turn comes again."""
CASES = [
    *((num_sequences, 1, 512) for num_sequences in (1, 4, 16, 64)),
    *((1, 1, context) for context in (4096, 16384)),
    *((1, 256, context) for context in (512, 4096, 16384)),
]
"""(sequences, new tokens of each, context)"""
MEASURE_S = 3.0
MIN_ROUNDS = 3
COMPILED = CpuBackend(block_tokens=BLOCK_TOKENS)
SDPA = TorchBackend("cpu", torch.float32, block_tokens=BLOCK_TOKENS, gather_tokens=0)


def to_token_major(pool: PoolTensors) -> PoolTensors:
    """The heads of a token side by side."""
    for tensors in (pool.keys_KSD, pool.values_KSD):
        tensors[:] = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]
    return pool


def make_pool(num_slots: int, dtype: torch.dtype = torch.float32) -> PoolTensors:
    layer_bytes = 2 * dtype.itemsize * num_slots * KV_HEADS * HEAD_DIM
    pool = PoolTensors(
        layer_start=0,
        num_layers=max(1, -(-POOL_BYTES // layer_bytes)),
        num_blocks=num_slots // BLOCK_TOKENS,
        block_tokens=BLOCK_TOKENS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        torch_device=torch.device("cpu"),
    )
    for tensor in (*pool.keys_KSD, *pool.values_KSD):
        tensor.normal_()
    return pool


def make_batch(num_sequences: int, new_tokens: int, context: int) -> ScheduledBatch:
    each = context // BLOCK_TOKENS
    chunks = tuple(
        Chunk(
            sequence_id=i,
            start=context - new_tokens,
            token_ids=(1,) * new_tokens,
            block_ids=tuple(range(i * each, (i + 1) * each)),
            sampling=None,
        )
        for i in range(num_sequences)
    )
    return ScheduledBatch(step_id=0, chunks=chunks)


def measure(num_sequences: int, new_tokens: int, context: int) -> dict[str, float]:
    """Median seconds of the core's time for one layer with each pool, in turn, each time on the next layer."""
    num_slots, num_tokens = num_sequences * context, num_sequences * new_tokens
    pools: dict[str, tuple[Backend, PoolTensors]] = {
        "sdpa, token-major": (SDPA, to_token_major(make_pool(num_slots))),
        "sdpa": (SDPA, make_pool(num_slots)),
    }
    pools |= {
        f"compiled, {name}": (COMPILED, make_pool(num_slots, FORMAT_DTYPES[name]))
        for name in ("fp32", "fp16")
    }
    scheduled = make_batch(num_sequences, new_tokens, context)
    batches = {backend: backend.prepare(scheduled) for backend in (SDPA, COMPILED)}
    query_TND = torch.randn(num_tokens, KV_HEADS * GROUP, HEAD_DIM)
    key_TKD, value_TKD = torch.randn(2, num_tokens, KV_HEADS, HEAD_DIM)
    seconds: dict[str, list[float]] = {name: [] for name in pools}
    begun_s, layer = time.perf_counter(), 0
    while time.perf_counter() - begun_s < MEASURE_S or len(seconds["sdpa"]) < MIN_ROUNDS:
        for name, (backend, pool) in pools.items():
            layer = (layer + 1) % len(pool.keys_KSD)
            held = backend.kv_pool(pool)
            start_s = time.thread_time()
            held.attend(
                query_TND,
                key_TKD,
                value_TKD,
                layer=layer,
                batch=batches[backend],
                scale=SCALE,
                window_tokens=None,
                softcap=None,
                sinks_N=None,
            )
            seconds[name].append(time.thread_time() - start_s)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = []
    for num_sequences, new_tokens, context in CASES:
        seconds = measure(num_sequences, new_tokens, context)
        kind = "decode" if new_tokens == 1 else f"{new_tokens} new tokens"
        times = ", ".join(f"{name} {s / num_sequences * 1e6:.0f} µs" for name, s in seconds.items())
        print(f"{kind}, {num_sequences} sequences at {context}: {times} per sequence")
        rows.append({"sequences": num_sequences, "new_tokens": new_tokens, "context": context} | seconds)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
