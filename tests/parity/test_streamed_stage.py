"""A stage that streams some of its layers computes what one that holds them does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity.tiny_models import FAMILIES, make_checkpoint
from plans import hand_plan

from apportion.catalog.model_config import read_model_spec
from apportion.model.batch import FlatBatch
from apportion.model.build import build_stage
from apportion.model.load_memory import Unmetered
from apportion.model.stage import StageModel
from apportion.model.weights import Checkpoint
from apportion.types.plan import Stage
from apportion.types.request import Chunk, SamplingParams, ScheduledBatch

NUM_LAYERS = 5
BLOCK_TOKENS = 4
EVERY_RUN = {"llama", "olmo2", "qwen3_moe", "gpt_oss"}
"""Plain, with norms that are wrapped, with experts stored one by one, with biases and experts in one tensor."""


def build(folder: Path, stage: Stage) -> StageModel:
    return build_stage(
        folder,
        read_model_spec(folder),
        stage,
        0,
        weights=Checkpoint(folder),
        num_kv_blocks=8,
        block_tokens=BLOCK_TOKENS,
        all_reduce=lambda partial: partial,
        torch_device="cpu",
        memory=Unmetered(),
        lean=False,
    )


def logits(stage: StageModel, folder: Path) -> torch.Tensor:
    """Of a prompt in two chunks, and of one token after it."""
    vocab_rows = read_model_spec(folder).vocab_rows
    ids = [7 * position % vocab_rows for position in range(20)]
    drawn = []
    for start, stop in ((0, 12), (12, 19), (19, 20)):
        chunk = Chunk(
            sequence_id=0,
            start=start,
            token_ids=tuple(ids[start:stop]),
            block_ids=(3, 1, 4, 0, 5),
            sampling=SamplingParams(max_tokens=1),
        )
        batch = ScheduledBatch(step_id=0, chunks=(chunk,))
        flat = FlatBatch.build(batch, block_tokens=BLOCK_TOKENS, torch_device="cpu")
        drawn.append(stage.forward(flat.token_ids_T, flat))
    return torch.cat(drawn)


@pytest.mark.parametrize(
    "family",
    [name if name in EVERY_RUN else pytest.param(name, marks=pytest.mark.nightly) for name in FAMILIES],
)
def test_streaming_changes_nothing(family: str, tmp_path: Path):
    make_checkpoint(family, tmp_path, NUM_LAYERS)
    (held,) = hand_plan(read_model_spec(tmp_path), [[1]], [NUM_LAYERS]).stages
    streamed = replace(held, streamed_layers=(0, 2, 3))
    with torch.inference_mode():
        whole, streaming = build(tmp_path, held), build(tmp_path, streamed)
        pair = logits(whole, tmp_path), logits(streaming, tmp_path)
    torch.testing.assert_close(*pair, atol=2e-5, rtol=0)  # held weights are packed, streamed ones are not
    assert whole.parameters == streaming.parameters
    assert whole.streamed_bytes == 0
    of_layers = whole.weights_bytes - streaming.weights_bytes
    assert streaming.streamed_bytes == 3 * of_layers
    assert streaming.read_bytes < whole.read_bytes
