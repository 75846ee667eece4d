"""Time of a stage per layer: our own layers beside transformers', on one core, for decode batches and a prefill chunk;
how much of it lies in the matrix products, and what that comes to in weights read per second.

python benchmarks/lean_stage.py [weight format]
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest.mock import patch

import torch
from torch.nn import functional as F

from apportion.catalog.model_config import read_model_spec
from apportion.model import attention
from apportion.model.backends.cpu.backend import CpuBackend
from apportion.model.backends.cpu.batch import CpuBatch
from apportion.model.build import build_stage
from apportion.model.hf import build as hf
from apportion.model.kernels.op_table import OpTable
from apportion.model.lean import layers as lean
from apportion.model.stage import StageModel
from apportion.model.weights.linear import PackedLinear
from apportion.model.weights.load_memory import Unmetered
from apportion.model.weights.random_weights import RandomWeights
from apportion.types.plan import Stage, TensorSplit
from apportion.types.request import Chunk, ScheduledBatch

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
LAYERS = (8, 16)
"""A stage in the middle: what it reads is beyond the caches, and it has no head."""
CONTEXT_TOKENS, BLOCK_TOKENS, MAX_BATCH = 512, 16, 32
BACKEND = CpuBackend(block_tokens=BLOCK_TOKENS)
BLOCKS_EACH = CONTEXT_TOKENS // BLOCK_TOKENS
CASES = {"decode 1": 1, "decode 4": 4, "decode 16": 16, "decode 32": 32, "prefill 256": None}
ROUNDS = 9
P, R = ParamSpec("P"), TypeVar("R")


def build(folder: Path, weight_format: str, *, own: bool) -> StageModel:
    model = read_model_spec(folder)
    split = TensorSplit(
        device_ids=("cpu",),
        q_heads=(model.q_heads,),
        kv_heads=(model.kv_heads,),
        ffn_columns=(model.ffn_columns,),
        vocab_rows=(model.vocab_rows,),
    )
    stage = Stage(
        layer_start=LAYERS[0],
        layer_stop=LAYERS[1],
        split=split,
        weight_format=weight_format,
        activation_format="fp32",
        kv_format="fp32",
        has_embedding=False,
        has_head=False,
    )
    return build_stage(
        folder,
        model,
        stage,
        0,
        weights=RandomWeights(),
        num_kv_blocks=MAX_BATCH * BLOCKS_EACH,
        all_reduce=lambda partial: partial,
        backend=BACKEND,
        memory=Unmetered(),
        lean=own,
    )


def make_batch(num_sequences: int | None) -> CpuBatch:
    new_tokens = 256 if num_sequences is None else 1
    chunks = tuple(
        Chunk(
            sequence_id=i,
            start=CONTEXT_TOKENS - new_tokens,
            token_ids=(1,) * new_tokens,
            block_ids=tuple(range(i * BLOCKS_EACH, (i + 1) * BLOCKS_EACH)),
            sampling=None,
        )
        for i in range(num_sequences or 1)
    )
    return BACKEND.prepare(ScheduledBatch(step_id=0, chunks=chunks))


class Clock:
    """Adds up what the functions it wraps take, each other's calls once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._running = False

    def around(self, function: Callable[P, R]) -> Callable[P, R]:
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            if self._running:
                return function(*args, **kwargs)
            self._running, begun_s = True, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - begun_s
                self._running = False

        return timed


def run_apart(products: Clock, attending: Clock) -> Callable[[OpTable, int, int], None]:
    """Runs a table's operations one by one, each under the clock of its kind."""
    run, clocks = OpTable.run, {"product": products, "attend": attending}

    def runs(table: OpTable, first: int, stop: int) -> None:
        for at in range(first, stop):
            clock = clocks.get(table.name(at))
            (clock.around(run) if clock else run)(table, at, at + 1)

    return runs


def measure(stage: StageModel, batch: CpuBatch) -> tuple[float, float, float]:
    """Seconds of the core's time a layer: in all, in matrix products, in attention."""
    hidden_TH = torch.randn(len(batch.rows.token_ids_T), CONFIG["hidden_size"])
    products, attending = Clock(), Clock()
    attend = attending.around(attention.paged_attention)
    with torch.inference_mode():
        begun_s = time.thread_time()
        stage.forward(hidden_TH, batch)
        whole_s = time.thread_time() - begun_s
        with (
            patch.object(PackedLinear, "forward", products.around(PackedLinear.forward)),
            patch.object(OpTable, "run", run_apart(products, attending)),
            patch.object(F, "linear", products.around(F.linear)),
            patch.object(hf, "paged_attention", attend),
            patch.object(lean, "paged_attention", attend),
        ):
            stage.forward(hidden_TH, batch)
    layers = LAYERS[1] - LAYERS[0]
    return whole_s / layers, products.seconds / layers, attending.seconds / layers


def read_bytes_per_s() -> float:
    values = torch.ones(2**26)
    seconds = []
    for _ in range(7):
        begun_s = time.thread_time()
        values.sum()
        seconds.append(time.thread_time() - begun_s)
    return values.nbytes / min(seconds)


def main() -> None:
    weight_format = sys.argv[1] if len(sys.argv) > 1 else "fp32"
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(CONFIG))
        stages = {kind: build(Path(name), weight_format, own=kind == "lean") for kind in ("hf", "lean")}
    print(f"{weight_format}; the core reads {read_bytes_per_s() / 1e9:.1f} GB/s")
    print(
        f"{'':12} {'':5} {'layer':>9} {'products':>9} {'attention':>9} {'rest':>9} {'outside':>8} {'weights':>9}"
    )
    rows = []
    for case, num_sequences in CASES.items():
        batch = make_batch(num_sequences)
        samples = {kind: [] for kind in stages}
        for _ in range(ROUNDS):
            for kind, stage in stages.items():
                samples[kind].append(measure(stage, batch))
        for kind, stage in stages.items():
            layer_s, products_s, attention_s = (
                statistics.median(part) for part in zip(*samples[kind], strict=True)
            )
            weights_bytes_per_s = stage.weights_bytes / (LAYERS[1] - LAYERS[0]) / layer_s
            rest_s, outside = layer_s - products_s - attention_s, 1 - products_s / layer_s
            micros = " ".join(f"{s * 1e6:6.0f} µs" for s in (layer_s, products_s, attention_s, rest_s))
            print(f"{case:12} {kind:5} {micros} {outside:7.0%} {weights_bytes_per_s / 1e9:5.1f} GB/s")
            rows.append(
                {
                    "case": case,
                    "kind": kind,
                    "layer_s": layer_s,
                    "products_s": products_s,
                    "attention_s": attention_s,
                }
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
