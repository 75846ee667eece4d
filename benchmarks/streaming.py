"""Measured against predicted time of a step that streams layers, in every weight format, or those named as arguments:
out of the page cache, and from a disk beside computing.

A stage of one core in this process, of random weights, its steps one after the other; rounds of all ways to hold the
weights are interleaved, and so is the probe of rates. Predicted: by cost/streaming.py from the step that holds
everything, as measured. `--small` and `--large` give other shapes than the one for which the model was made.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from apportion.catalog.model_config import read_model_spec
from apportion.cost.roofline import Step
from apportion.cost.shard import stage_shards
from apportion.cost.streaming import evenly_streamed, streaming_step_s
from apportion.model.backends.cpu.backend import CpuBackend
from apportion.model.build import build_stage
from apportion.model.stage import StageModel
from apportion.model.weights.layer_store import DiskStore, LayerStore, PageCacheStore
from apportion.model.weights.load_memory import Unmetered
from apportion.model.weights.random_weights import RandomWeights
from apportion.probe.cpu import cpu_device, measured_rates, product_rates
from apportion.probe.disk import disk_bytes_per_s
from apportion.types.cache import cache_folder
from apportion.types.cluster import Device
from apportion.types.plan import Stage
from apportion.types.request import Chunk, SamplingParams, ScheduledBatch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plans import hand_plan

NUM_LAYERS, BLOCK_TOKENS, CONTEXT_TOKENS = 8, 16, 512
BACKEND = CpuBackend(block_tokens=BLOCK_TOKENS)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 4000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}
FORMATS = ("fp32", "bf16", "fp16", "int8")
SHAPES = {
    "--small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "--large": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32},
}
STEPS = {"decode": (32, 1), "prefill of 64": (0, 64)}
"""Where a step's new tokens start, and how many there are."""
ROUNDS = 5

Way = tuple[int, Callable[[], LayerStore]]
WAYS: dict[str, Way] = {
    "held": (0, PageCacheStore),
    "4 of 8 streamed": (4, PageCacheStore),
    "8 of 8 streamed": (8, PageCacheStore),
    "8 of 8 from disk": (8, DiskStore),
}


def build(config: Path, stage: Stage, open_store: Callable[[], LayerStore]) -> StageModel:
    return build_stage(
        config,
        read_model_spec(config),
        stage,
        0,
        weights=RandomWeights(),
        num_kv_blocks=CONTEXT_TOKENS // BLOCK_TOKENS,
        all_reduce=lambda partial: partial,
        backend=BACKEND,
        memory=Unmetered(),
        open_store=open_store,
    )


def step_s(model: StageModel, start: int, tokens: int) -> float:
    chunk = Chunk(
        sequence_id=0,
        start=start,
        token_ids=(7,) * tokens,
        block_ids=tuple(range(CONTEXT_TOKENS // BLOCK_TOKENS)),
        sampling=SamplingParams(max_tokens=1),
    )
    batch = ScheduledBatch(step_id=0, chunks=(chunk,))
    flat = BACKEND.prepare(batch)
    begun_s = time.perf_counter()
    model.forward(flat.rows.token_ids_T, flat)
    return time.perf_counter() - begun_s


def measure(config: Path, weight_format: str) -> dict[str, object]:
    spec = read_model_spec(config)
    plan = hand_plan(spec, [[1]], [NUM_LAYERS], weight_format=weight_format, activation_format="fp32")
    stages = {
        name: replace(plan.stages[0], streamed_layers=evenly_streamed(spec, 0, NUM_LAYERS, count))
        for name, (count, _) in WAYS.items()
    }
    models = {name: build(config, stages[name], open_store) for name, (_, open_store) in WAYS.items()}
    times: dict[tuple[str, str], list[float]] = {(step, name): [] for step in STEPS for name in models}
    probed: list[Device] = []
    products = product_rates(1)
    assert products is not None
    for _ in range(ROUNDS):
        rates = replace(measured_rates(1), flops_per_s=products.flops_per_s)
        probed.append(cpu_device(rates, 1, rates.read_bytes_per_s, disk_bytes_per_s(cache_folder())))
        for step, name in times:
            step_s(models[name], *STEPS[step])  # what ran before is still in the caches
            times[step, name].append(step_s(models[name], *STEPS[step]))
    device = typical(probed)
    rows: dict[str, object] = {"GB/s": rates_of(device)}
    for step, name in times:
        members = [(streaming_from(device, WAYS[name][1]), stage_shards(spec, stages[name])[0])]
        start, tokens = STEPS[step]
        work = Step(sequences=1, new_tokens=tokens, start_tokens=start, sampled_rows=1)
        predicted_s = streaming_step_s(members, work, median(times[step, "held"]))
        rows[f"{step}, {name}"] = _row(median(times[step, name]), predicted_s)
    return rows


def typical(probed: list[Device]) -> Device:
    """Each rate is the median of the rounds'."""
    caches = [device.cache for device in probed if device.cache is not None]
    return replace(
        probed[0],
        mem_bytes_per_s=median(device.mem_bytes_per_s for device in probed),
        stream_bytes_per_s=median(device.stream_bytes_per_s or 0.0 for device in probed),
        disk_bytes_per_s=median(device.disk_bytes_per_s or 0.0 for device in probed),
        cache=replace(
            caches[0],
            read_bytes_per_s=median(cache.read_bytes_per_s for cache in caches),
            copied_bytes_per_s=median(cache.copied_bytes_per_s for cache in caches),
        )
        if caches
        else None,
    )


def streaming_from(device: Device, open_store: Callable[[], LayerStore]) -> Device:
    if open_store is not DiskStore:
        return device
    return replace(device, stream_from="disk", stream_bytes_per_s=device.disk_bytes_per_s)


def rates_of(device: Device) -> dict[str, float]:
    rates = {
        "read": device.mem_bytes_per_s,
        "copied": device.stream_bytes_per_s or 0.0,
        "disk": device.disk_bytes_per_s or 0.0,
        "read from cache": device.cache.read_bytes_per_s if device.cache else 0.0,
        "copied into cache": device.cache.copied_bytes_per_s if device.cache else 0.0,
    }
    return {name: round(rate / 1e9, 2) for name, rate in rates.items()}


def _row(measured_s: float, predicted_s: float) -> dict[str, float]:
    return {
        "measured ms": round(measured_s * 1e3, 1),
        "predicted ms": round(predicted_s * 1e3, 1),
        "ratio": round(measured_s / predicted_s, 3),
    }


def main() -> None:
    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    shape = next((SHAPES[name] for name in sys.argv[1:] if name in SHAPES), {})
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        config = Path(name) / "config.json"
        config.write_text(json.dumps(CONFIG | shape))
        for weight_format in [one for one in sys.argv[1:] if one not in SHAPES] or FORMATS:
            print(weight_format)
            for row_name, row in measure(config, weight_format).items():
                print(f"  {row_name}: {json.dumps(row)}")


if __name__ == "__main__":
    main()
