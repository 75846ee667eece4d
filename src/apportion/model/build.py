"""Builds a member's part of a stage: of lean layers where the model allows it, of transformers' otherwise.

transformers is imported in the second case alone: that takes longer than everything else about starting a worker.
"""

from functools import partial
from pathlib import Path

import torch

from apportion.model.decoder_stage import DecoderStage, StageModules
from apportion.model.kv_pool import KVPool
from apportion.model.lean.build import lean_modules
from apportion.model.lean.compile import lean_program
from apportion.model.lean.config import LeanConfig, lean_config
from apportion.model.lean.ops import Norm
from apportion.model.lean.program import LeanProgram
from apportion.model.reduction import AllReduce, compiled
from apportion.model.rope import Rope
from apportion.model.sharded_modules import VocabParallelEmbedding
from apportion.model.stage import StageModel
from apportion.model.weights.checkpoint import FORMAT_DTYPES, Weights
from apportion.model.weights.layer_store import OpenStore, PageCacheStore
from apportion.model.weights.load_memory import LoadMemory
from apportion.model.weights.parameters import ParameterReader
from apportion.model.weights.shard import RankShares
from apportion.types.model import ModelSpec
from apportion.types.plan import Stage


def import_layers(folder: Path, model: ModelSpec, stage: Stage, weights: Weights) -> None:
    """Imports what the stage's layers need, so that its memory is not counted as theirs. Raises ModelError."""
    if _lean_config(folder, model, stage, weights) is None:
        from apportion.model.hf.build import import_family

        import_family(folder)


def build_stage(
    folder: Path,
    model: ModelSpec,
    stage: Stage,
    rank: int,
    *,
    weights: Weights,
    num_kv_blocks: int,
    block_tokens: int,
    all_reduce: AllReduce,
    torch_device: str,
    memory: LoadMemory,
    open_store: OpenStore = PageCacheStore,
    lean: bool = True,
) -> StageModel:
    """Member `rank` of `stage`, of the config in `folder`: first it reads its `weights`, then it takes the KV pool.

    `all_reduce` sums over the members (identity for one); `memory` is told of each allocation; a store keeps streamed
    layers' weights; without `lean` all layers are transformers'. Raises ModelError for an unusable checkpoint.
    """
    shares = RankShares.of(model, stage, rank)
    reader = ParameterReader(weights, model, stage, shares, torch_device, memory)
    config = _lean_config(folder, model, stage, weights) if lean else None
    if config is not None:
        modules = lean_modules(reader, config, model, stage, all_reduce, open_store)
    else:
        from apportion.model.hf.build import hf_modules

        modules = hf_modules(reader, folder, model, stage, rank, all_reduce, open_store)
    pool = _kv_pool(model, stage, shares, num_kv_blocks, block_tokens, torch_device)
    programs = _programs(modules, pool, reader, model, stage, all_reduce)
    memory.observe()
    return DecoderStage(
        modules,
        pool,
        programs,
        parameters=reader.parameters,
        weights_bytes=reader.weights_bytes,
        read_bytes=weights.read_bytes,
    )


def _lean_config(folder: Path, model: ModelSpec, stage: Stage, weights: Weights) -> LeanConfig | None:
    """All experts in one tensor, which no published checkpoint has, are left to transformers' layers."""
    whole_experts = f"model.layers.{stage.layer_start}.mlp.experts.gate_up_proj"
    return None if whole_experts in weights else lean_config(folder, model)


def _programs(
    modules: StageModules,
    pool: KVPool,
    reader: ParameterReader,
    model: ModelSpec,
    stage: Stage,
    all_reduce: AllReduce,
) -> list[LeanProgram | None]:
    """By the buffer in which a step's first streamed layer arrives."""
    num_buffers = modules.stream.num_buffers if modules.stream else 1
    ropes = [rotary for rotary in modules.rotaries if isinstance(rotary, Rope)]
    if reader.torch_device != "cpu" or reader.dtype != torch.float32 or not ropes:
        return [None] * num_buffers
    reduction = compiled(all_reduce) if stage.split.size > 1 else None
    embedding, norm = modules.embedding, modules.norm
    assert isinstance(embedding, VocabParallelEmbedding | None)
    assert isinstance(norm, Norm | None)
    ends = {"embedding": embedding, "norm": norm, "all_reduce": reduction}
    make = partial(lean_program, modules.layers, ropes, pool, model.hidden_size, **ends)
    return [make(first_buffer=buffer) for buffer in range(num_buffers)]


def _kv_pool(
    model: ModelSpec,
    stage: Stage,
    shares: RankShares,
    num_kv_blocks: int,
    block_tokens: int,
    torch_device: str,
) -> KVPool:
    return KVPool(
        layer_start=stage.layer_start,
        num_layers=stage.num_layers,
        num_blocks=num_kv_blocks,
        block_tokens=block_tokens,
        kv_heads=shares.heads.count,
        head_dim=model.head_dim,
        dtype=FORMAT_DTYPES[stage.kv_format],
        torch_device=torch_device,
    )
