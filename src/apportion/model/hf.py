"""Builds a stage from transformers' decoder layers: with `hf_config` all that touches transformers' internals.

Each layer is built on the meta device from a config shrunk to the member's share, and its parameters are then read one
at a time; for the families in `lean` a layer of our own takes its place, unless its weights are streamed. Attention
goes to the paged pool through `AttentionInterface`.

Shapes: T = tokens of the batch, H = hidden size; the member's share of: N = query heads, K = KV heads,
V = vocabulary rows; D = head dim.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from apportion.model.attention import paged_attention
from apportion.model.batch import FlatBatch
from apportion.model.hf_config import ATTENTION, AXES, FamilyConfigs, read_config, skeleton_of
from apportion.model.hf_stage import HfStage, StageModules
from apportion.model.kv_pool import KVPool
from apportion.model.lean import LeanLayer, can_be_lean, lean_layer
from apportion.model.load_memory import LoadMemory
from apportion.model.parameters import ParameterReader, parameter_shapes
from apportion.model.shard import Axis, RankShares, Shape
from apportion.model.sharded_modules import AllReduce, RowParallelLinear, VocabParallelEmbedding, WideRMSNorm
from apportion.model.stage import StageModel
from apportion.model.streaming import LayerStream, StreamedLayer
from apportion.model.weights import FORMAT_DTYPES, Weights
from apportion.types.model import ModelSpec
from apportion.types.plan import Stage


def _attend(
    module: Any,
    query_1NTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    batch: FlatBatch,
    kv_pool: KVPool,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert attention_mask is None
    out_TND = paged_attention(
        query_1NTD[0].transpose(0, 1),
        key_1KTD[0].transpose(0, 1),
        value_1KTD[0].transpose(0, 1),
        layer=module.layer_idx,
        batch=batch,
        kv_pool=kv_pool,
        scale=scaling,
        window_tokens=sliding_window,
        softcap=softcap,
        sinks_N=s_aux,
    )
    return out_TND[None], None


AttentionInterface.register(ATTENTION, _attend)


def import_family(folder: Path) -> None:
    """Imports transformers' code for the model in `folder`, so that its memory is not counted as the stage's."""
    skeleton_of(read_config(folder))


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
    lean: bool | None = None,
) -> StageModel:
    """Member `rank` of `stage`, of the config in `folder`: first it reads its `weights`, then it takes the KV pool.

    `lean` forces our own layers or transformers'; None takes ours where the family has them.
    `all_reduce` sums over the members (identity for one); `memory` is told of each allocation.
    Raises ModelError for a checkpoint that cannot be used.
    """
    shares = RankShares.of(model, stage, rank)
    config = read_config(folder)
    assert config.model_type == model.family
    reader = ParameterReader(weights, model, stage, shares, torch_device, memory)
    if lean is None:
        lean = can_be_lean(model, stage, weights)
    configs = FamilyConfigs.of(config, model, shares)
    modules = _build_modules(configs, reader, lean, model, stage, rank, all_reduce)
    pool = _kv_pool(model, stage, shares, num_kv_blocks, block_tokens, torch_device)
    memory.observe()
    return HfStage(
        config,
        modules,
        pool,
        parameters=reader.parameters,
        weights_bytes=reader.weights_bytes,
        read_bytes=weights.read_bytes,
    )


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
        dtype=FORMAT_DTYPES[stage.activation_format],
        torch_device=torch_device,
    )


def _build_modules(
    configs: "FamilyConfigs",
    reader: ParameterReader,
    lean: bool,
    model: ModelSpec,
    stage: Stage,
    rank: int,
    all_reduce: AllReduce,
) -> StageModules:
    skeleton = skeleton_of(configs.local)
    make_lean = partial(lean_layer, reader, model, all_reduce) if lean else None
    layers, stream = _build_layers(type(skeleton.model.layers[0]), configs, reader, stage, make_lean)
    for layer in layers:
        if not isinstance(layer, LeanLayer):
            _install_reductions(layer, model, rank, all_reduce)
    embedding = _embedding(skeleton.model.embed_tokens, reader, all_reduce) if stage.has_embedding else None
    rotary = type(skeleton.model.rotary_emb)(configs.local).to(reader.torch_device)
    return StageModules(
        layers=layers,
        stream=stream,
        rotary=rotary,
        rotary_kinds=_rotary_kinds(rotary, configs.local, stage),
        embedding=embedding,
        norm=reader.final_norm(skeleton.model.norm) if stage.has_head else None,
        head=reader.head(embedding and embedding.table) if stage.has_head else None,
    )


def _embedding(embedding: Any, reader: ParameterReader, all_reduce: AllReduce) -> VocabParallelEmbedding:
    table = reader.lookup_table(getattr(embedding, "scalar_embed_scale", 1.0))  # gemma's
    vocab = reader.shares.vocab
    return VocabParallelEmbedding(table, vocab.start, vocab.units, all_reduce)


def _rotary_kinds(rotary: nn.Module, rotary_config: Any, stage: Stage) -> list[str] | None:
    """gemma3 rotates its sliding and its full layers by different frequencies; others have one set."""
    if not hasattr(rotary, "layer_types"):
        return None
    return rotary_config.layer_types[stage.layer_start : stage.layer_stop]


def _build_layers(
    layer_class: type[nn.Module],
    configs: FamilyConfigs,
    reader: ParameterReader,
    stage: Stage,
    make_lean: Callable[..., nn.Module] | None,
) -> tuple[list[nn.Module], LayerStream | None]:
    assert stage.split.size == 1 or not stage.streamed_layers, "the members of a group hold their layers"
    layers: list[nn.Module] = []
    streamed: list[StreamedLayer] = []
    for index in range(stage.layer_start, stage.layer_stop):
        with torch.device("meta"):
            layer = layer_class(configs.local, index)
            full = layer if stage.split.size == 1 else layer_class(configs.full, index)
            shrunk: dict[Axis, dict[str, Shape]] = {}
            if stage.split.size > 1:
                shrunk = {axis: parameter_shapes(layer_class(configs.shrunk[axis], index)) for axis in AXES}
        if make_lean is not None and index not in stage.streamed_layers:
            layers.append(make_lean(layer, parameter_shapes(full), shrunk))
            continue
        layers.append(layer.eval())
        if index in stage.streamed_layers:
            streamed.append(reader.streamed_layer(layer, index))
        else:
            reader.layer(layer, index, parameter_shapes(full), shrunk)
    return layers, reader.stream(streamed) if streamed else None


def _install_reductions(layer: Any, model: ModelSpec, rank: int, all_reduce: AllReduce) -> None:
    """Puts the group's reductions where partial results arise: after attention and FFN, in wide norms."""
    attention, ffn = layer.self_attn, layer.mlp
    for name, heads in (("q_norm", model.q_heads), ("k_norm", model.kv_heads)):
        norm = getattr(attention, name, None)
        if norm is not None and model.family == "olmo2":
            full_width = heads * model.head_dim
            setattr(attention, name, WideRMSNorm(norm.weight, norm.variance_epsilon, full_width, all_reduce))
    attention.o_proj = RowParallelLinear(attention.o_proj, all_reduce)
    if not hasattr(ffn, "experts"):
        ffn.down_proj = RowParallelLinear(ffn.down_proj, all_reduce)
        return
    ffn.experts.register_forward_hook(lambda _module, _inputs, out_TH: all_reduce(out_TH))
    if rank > 0 and hasattr(ffn.experts, "down_proj_bias"):
        ffn.experts.down_proj_bias.zero_()  # added before the reduction, it must count once
