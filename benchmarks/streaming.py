"""Measured against predicted time of a decode step that streams layers: warm, and from disk, read ahead or not.

A stage of one core in this process, its steps one after the other; rounds of all ways to hold the weights are
interleaved. Predicted: the step that holds everything, measured, and the streamed bytes at the rate at which the probe
copies out of the page cache (or, from disk, the slower of that and the rate at which the file is read in one go).
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
from transformers import LlamaConfig, LlamaForCausalLM

from apportion.catalog.model_config import read_model_spec
from apportion.cost.shard import stage_shards
from apportion.cost.streaming import evenly_streamed, streamed_bytes
from apportion.model.batch import FlatBatch
from apportion.model.build import build_stage
from apportion.model.load_memory import Unmetered
from apportion.model.stage import StageModel
from apportion.model.weights import Checkpoint
from apportion.probe.cpu_rates import copied_bytes_per_s
from apportion.types.plan import Stage
from apportion.types.request import Chunk, SamplingParams, ScheduledBatch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plans import hand_plan

NUM_LAYERS, BLOCK_TOKENS, CONTEXT_TOKENS = 8, 16, 64
STREAMED = {"held": 0, "4 of 8 streamed": 4, "8 of 8 streamed": 8}
ROUNDS, DISK_STEPS = 5, 3


class Unadvised(Checkpoint):
    """Tells the kernel nothing of what it will read."""

    def will_read(self, name: str) -> None:
        pass


def write_model(folder: Path) -> None:
    """Llama's shape, random weights in fp32."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=4000,
        tie_word_embeddings=True,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10GB")


def build(folder: Path, stage: Stage, weights: Checkpoint) -> StageModel:
    return build_stage(
        folder,
        read_model_spec(folder),
        stage,
        0,
        weights=weights,
        num_kv_blocks=CONTEXT_TOKENS // BLOCK_TOKENS,
        block_tokens=BLOCK_TOKENS,
        all_reduce=lambda partial: partial,
        torch_device="cpu",
        memory=Unmetered(),
        lean=False,
    )


def step_s(model: StageModel, before: Callable[[], None] = lambda: None) -> float:
    """One token at position 32; `before` runs outside the measured time."""
    before()
    chunk = Chunk(
        sequence_id=0,
        start=32,
        token_ids=(7,),
        block_ids=tuple(range(CONTEXT_TOKENS // BLOCK_TOKENS)),
        sampling=SamplingParams(max_tokens=1),
    )
    flat = FlatBatch.build(
        ScheduledBatch(step_id=0, chunks=(chunk,)), block_tokens=BLOCK_TOKENS, torch_device="cpu"
    )
    begun_s = time.perf_counter()
    model.forward(flat.token_ids_T, flat)
    return time.perf_counter() - begun_s


def evict(file: Path) -> None:
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes_per_s(file: Path) -> float:
    """From disk, in one go."""
    evict(file)
    target = memoryview(bytearray(2**22))
    begun_s, size = time.perf_counter(), 0
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(target):
            size += count
    return size / (time.perf_counter() - begun_s)


def main() -> None:
    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        write_model(folder)
        os.sync()  # what is not written yet cannot be evicted
        (stage,) = hand_plan(
            read_model_spec(folder), [[1]], [NUM_LAYERS], max_context_tokens=CONTEXT_TOKENS
        ).stages
        print(json.dumps(measure(folder, stage), indent=2))


def measure(folder: Path, stage: Stage) -> dict[str, object]:
    spec = read_model_spec(folder)
    stages = {
        name: replace(stage, streamed_layers=evenly_streamed(spec, 0, NUM_LAYERS, count))
        for name, count in STREAMED.items()
    }
    models = {name: build(folder, one, Checkpoint(folder)) for name, one in stages.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        step_s(model)
    copied = []
    for _ in range(ROUNDS):
        copied.append(copied_bytes_per_s())
        for name, model in models.items():
            times[name].append(step_s(model))
    copy_bytes_per_s, held_s = median(copied), median(times["held"])
    sizes = {name: streamed_bytes(stage_shards(spec, one)[0]) for name, one in stages.items()}
    shown: dict[str, object] = {"copied GB/s": round(copy_bytes_per_s / 1e9, 2)}
    for name in models:
        predicted_s = held_s + sizes[name] / copy_bytes_per_s
        shown[name] = _row(median(times[name]), predicted_s)
    shown |= from_disk(folder, stages["8 of 8 streamed"], held_s, sizes["8 of 8 streamed"], copy_bytes_per_s)
    return shown


def from_disk(
    folder: Path, stage: Stage, held_s: float, size_bytes: int, copy_bytes_per_s: float
) -> dict[str, object]:
    """Every step begins with nothing of the file in memory."""
    file = folder / "model.safetensors"
    disk_bytes_per_s = median(read_bytes_per_s(file) for _ in range(DISK_STEPS))
    models = {
        "from disk, read ahead": build(folder, stage, Checkpoint(folder)),
        "from disk, not read ahead": build(folder, stage, Unadvised(folder)),
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(DISK_STEPS + 1):  # the first finds out that the weights come from disk
        for name, model in models.items():
            times[name].append(step_s(model, lambda: evict(file)))
    predicted_s = max(held_s + size_bytes / copy_bytes_per_s, size_bytes / disk_bytes_per_s)
    rows = {name: _row(median(seconds[1:]), predicted_s) for name, seconds in times.items()}
    return {"disk GB/s": round(disk_bytes_per_s / 1e9, 2), **rows}


def _row(measured_s: float, predicted_s: float) -> dict[str, float]:
    return {
        "measured ms": round(measured_s * 1e3, 1),
        "predicted ms": round(predicted_s * 1e3, 1),
        "ratio": round(measured_s / predicted_s, 3),
    }


if __name__ == "__main__":
    main()
