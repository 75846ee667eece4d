"""Builds a member's part of a stage: of lean layers where the model allows it, of transformers' otherwise.

transformers is imported in the second case alone: that takes longer than everything else about starting a worker.
"""

from pathlib import Path

from apportion.model.backend import Backend
from apportion.model.decoder_stage import DecoderStage
from apportion.model.kv_pool import KVPool, PoolTensors
from apportion.model.lean.build import lean_modules
from apportion.model.lean.config import LeanConfig, lean_config
from apportion.model.reduction import AllReduce
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
    all_reduce: AllReduce,
    backend: Backend,
    memory: LoadMemory,
    open_store: OpenStore = PageCacheStore,
    lean: bool = True,
) -> StageModel:
    """Member `rank` of `stage`, of the config in `folder`: first it reads its `weights`, then it takes the KV pool.

    `all_reduce` sums over the members (identity for one); `memory` is told of each allocation; a store keeps streamed
    layers' weights; without `lean` all layers are transformers'. Raises ModelError for an unusable checkpoint.
    """
    shares = RankShares.of(model, stage, rank)
    reader = ParameterReader(weights, model, stage, shares, backend, memory)
    all_reduce = backend.through_host(all_reduce)
    config = _lean_config(folder, model, stage, weights) if lean else None
    if config is not None:
        modules = lean_modules(reader, config, model, stage, all_reduce, open_store)
    else:
        from apportion.model.hf.build import hf_modules

        modules = hf_modules(reader, folder, model, stage, rank, all_reduce, open_store)
    pool = _kv_pool(backend, model, stage, shares, num_kv_blocks)
    reduced = all_reduce if stage.split.size > 1 else None
    programs = backend.programs(modules, pool, model.hidden_size, reduced)
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


def _kv_pool(
    backend: Backend,
    model: ModelSpec,
    stage: Stage,
    shares: RankShares,
    num_kv_blocks: int,
) -> KVPool:
    tensors = PoolTensors(
        layer_start=stage.layer_start,
        num_layers=stage.num_layers,
        num_blocks=num_kv_blocks,
        block_tokens=backend.block_tokens,
        kv_heads=shares.heads.count,
        head_dim=model.head_dim,
        dtype=FORMAT_DTYPES[stage.kv_format],
        torch_device=backend.torch_device,
    )
    return backend.kv_pool(tensors)
