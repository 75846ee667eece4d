"""A stage that streams some of its layers computes what one that holds them does, bit for bit, in every format."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity.test_stage_inprocess import (
    NUM_BLOCKS,
    SEQUENCES,
    STEPS,
    RunningStage,
    ThreadGroup,
    make_stages,
    scheduled,
    stage_backend,
)
from parity.tiny_models import FAMILIES, make_checkpoint

from apportion.catalog.model_config import read_model_spec
from apportion.cost.memory import parameters, read_bytes
from apportion.cost.shard import stage_shards
from apportion.cost.streaming import streamed_bytes
from apportion.model.build import build_stage
from apportion.model.weights.checkpoint import Checkpoint, Weights
from apportion.model.weights.layer_store import DiskStore, LayerStore, PageCacheStore
from apportion.model.weights.load_memory import Unmetered
from apportion.model.weights.random_weights import RandomWeights
from apportion.types.plan import Stage

NUM_LAYERS = 5
STREAMED = (0, 2, 3)
FORMATS = ("fp32", "bf16", "fp16", "int8")
EVERY_RUN = {"llama", "gemma2", "olmo2", "qwen3_moe", "gpt_oss"}
"""Plain with biases, with norms that are stored less 1, with norms over all heads, with experts and unlike layers, with
biases and experts in one tensor; the second and the fourth have our own layers."""
IDS = [
    [(7 * position + sequence) % 509 for position in range(length)]
    for sequence, (length, _) in enumerate(SEQUENCES)
]


def build(
    folder: Path, stage: Stage, open_store: Callable[[], LayerStore], weights: Callable[[], Weights]
) -> RunningStage:
    group, backend = ThreadGroup(stage.split.size), stage_backend(stage)
    members = [
        build_stage(
            folder,
            read_model_spec(folder),
            stage,
            rank,
            weights=weights(),
            num_kv_blocks=NUM_BLOCKS,
            all_reduce=group.all_reduce(rank),
            backend=backend,
            memory=Unmetered(),
            open_store=open_store,
        )
        for rank in range(stage.split.size)
    ]
    return RunningStage(stage, members, group, backend)


def logits(running: RunningStage) -> torch.Tensor:
    """Of every step's chunks: prefill in pieces, decode beside it."""
    drawn = []
    with torch.inference_mode():
        for step in range(len(STEPS)):
            flat = running.backend.prepare(scheduled(step, IDS))
            drawn.append(running.forward(flat.rows.token_ids_T, flat))
    return torch.cat(drawn)


def check_streaming(
    folder: Path,
    members: list[int],
    weight_format: str,
    open_store: Callable[[], LayerStore],
    weights: Callable[[], Weights],
) -> None:
    spec = read_model_spec(folder)
    (held,) = make_stages(spec, [(NUM_LAYERS, members)], weight_format, "fp32")
    stage = replace(held, streamed_layers=STREAMED)
    whole = build(folder, held, open_store, weights)
    streaming = build(folder, stage, open_store, weights)
    assert torch.equal(logits(whole), logits(streaming))
    for rank, (holding, member) in enumerate(zip(whole.members, streaming.members, strict=True)):
        of_layers = streamed_bytes(stage_shards(spec, stage)[rank])
        assert member.parameters == holding.parameters == parameters(spec, stage, rank)
        assert member.read_bytes == holding.read_bytes
        assert holding.weights_bytes - member.weights_bytes == of_layers
        assert (holding.streamed_bytes, member.streamed_bytes) == (0, len(STEPS) * of_layers)
        if weights is not RandomWeights:
            assert member.read_bytes == read_bytes(spec, stage, rank)


@pytest.mark.parametrize(
    ("family", "weight_format"),
    [
        (name, weight_format)
        if name in EVERY_RUN and weight_format in {"fp32", "int8"}
        else pytest.param(name, weight_format, marks=pytest.mark.nightly)
        for name in FAMILIES
        for weight_format in FORMATS
        if weight_format == "fp32" or name != "gpt_oss"  # its experts, all in one tensor, are not packed
    ],
)
def test_streaming_changes_nothing(family: str, weight_format: str, tmp_path: Path):
    make_checkpoint(family, tmp_path, NUM_LAYERS)
    check_streaming(tmp_path, [1], weight_format, PageCacheStore, lambda: Checkpoint(tmp_path))


@pytest.mark.parametrize("open_store", [PageCacheStore, DiskStore])
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_members_of_a_group_stream_their_shares(
    family: str, open_store: Callable[[], LayerStore], tmp_path: Path
):
    make_checkpoint(family, tmp_path, NUM_LAYERS)
    check_streaming(tmp_path, [3, 1], "int8", open_store, lambda: Checkpoint(tmp_path))


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_random_weights_stream_from_a_disk(family: str, tmp_path: Path):
    """With two buffers an odd number of layers is in the one and in the other in turn."""
    make_checkpoint(family, tmp_path, NUM_LAYERS)
    check_streaming(tmp_path, [1], "bf16", DiskStore, RandomWeights)
