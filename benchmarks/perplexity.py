"""Perplexity of the bundled model in each format of weights and of keys and values, on the text held out from its
training: `python benchmarks/perplexity.py tinyshakespeare.txt [weights/kv …]`.

As its model card measures the loss: every token but the first, over consecutive windows of 256 tokens of the last 10 %
of the text. Through the engine's own stage and paged KV cache, as prompts are (chunks of 128 tokens), and of the first
windows also one token at a time, as output is.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.model.backends.cpu.backend import CpuBackend
from apportion.model.build import build_stage
from apportion.model.stage import StageModel
from apportion.model.weights.checkpoint import Checkpoint
from apportion.model.weights.load_memory import Unmetered
from apportion.types.request import Chunk, ScheduledBatch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plans import hand_plan

FORMATS = (
    *("fp32/fp32", "fp32/fp16", "fp32/bf16"),
    *("bf16/fp32", "bf16/bf16", "fp16/fp32", "fp16/fp16", "int8/fp32", "int8/fp16"),
)
WINDOW_TOKENS, CHUNK_TOKENS, BLOCK_TOKENS = 256, 128, 16
BACKEND = CpuBackend(block_tokens=BLOCK_TOKENS)
BLOCK_IDS = tuple(range(WINDOW_TOKENS // BLOCK_TOKENS))


def whole_stage(folder: Path, weight_format: str, kv_format: str) -> StageModel:
    model = read_model_spec(folder)
    formats = {"weight_format": weight_format, "activation_format": "fp32", "kv_format": kv_format}
    plan = hand_plan(model, [[1]], [model.num_layers], **formats)
    return build_stage(
        folder,
        model,
        plan.stages[0],
        0,
        weights=Checkpoint(folder),
        num_kv_blocks=len(BLOCK_IDS),
        all_reduce=lambda partial: partial,
        backend=BACKEND,
        memory=Unmetered(),
    )


def chunk_logits(stage: StageModel, start: int, token_ids: tuple[int, ...]) -> Tensor:
    """logits_TV after each token of a chunk."""
    chunk = Chunk(0, start, token_ids, BLOCK_IDS, None)
    flat = BACKEND.prepare(ScheduledBatch(step_id=0, chunks=(chunk,)))
    flat = replace(flat, rows=replace(flat.rows, sample_rows_N=torch.arange(len(token_ids))))
    return stage.forward(flat.rows.token_ids_T, flat)


def window_nats(stage: StageModel, ids: tuple[int, ...], chunk_tokens: int) -> float:
    starts = range(0, len(ids) - 1, chunk_tokens)
    chunks = [(start, ids[start : min(start + chunk_tokens, len(ids) - 1)]) for start in starts]
    logits_TV = torch.cat([chunk_logits(stage, start, chunk) for start, chunk in chunks])
    return F.cross_entropy(logits_TV, torch.tensor(ids[1:]), reduction="sum").item()


@torch.inference_mode()
def main() -> None:
    text = Path(sys.argv[1]).read_text()
    folder = resolve_model("demo", weights=True)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text[int(len(text) * 0.9) :]).ids
    windows = [tuple(ids[i : i + WINDOW_TOKENS + 1]) for i in range(0, len(ids) - 1, WINDOW_TOKENS)]
    rows: list[dict[str, object]] = []
    print("| weights | keys, values | chunks | nats per token | perplexity |\n|---|---|---|---|---|")
    for weights, kv in (name.split("/") for name in sys.argv[2:] or FORMATS):
        stage = whole_stage(folder, weights, kv)
        for chunk_tokens, some in ((CHUNK_TOKENS, windows), (CHUNK_TOKENS, windows[:20]), (1, windows[:20])):
            num_tokens = sum(len(window) - 1 for window in some)
            nats = sum(window_nats(stage, window, chunk_tokens) for window in some) / num_tokens
            label = f"{chunk_tokens}, {num_tokens} tokens"
            print(f"| {weights} | {kv} | {label} | {nats:.4f} | {math.exp(nats):.3f} |", flush=True)
            rows.append(
                {
                    "weights": weights,
                    "kv": kv,
                    "chunk_tokens": chunk_tokens,
                    "tokens": num_tokens,
                    "perplexity": math.exp(nats),
                }
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
