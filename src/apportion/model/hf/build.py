"""Builds a stage from transformers' decoder layers: with `config` all that touches transformers' internals.

Each layer is built on the meta device from a config shrunk to the member's share, and its parameters are then read one
at a time. Attention goes to the paged pool through `AttentionInterface`.

Shapes: T = tokens of the batch, H = hidden size, D = head dim; the member's share of: N = query heads, K = KV heads.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from apportion.model.batch import FlatBatch
from apportion.model.decoder_stage import StageModules
from apportion.model.hf.config import ATTENTION, AXES, FamilyConfigs, read_config, skeleton_of
from apportion.model.kv_pool import KVPool
from apportion.model.reduction import AllReduce
from apportion.model.rope import Rotary
from apportion.model.sharded_modules import RowParallelLinear, VocabParallelEmbedding, WideRMSNorm
from apportion.model.weights.layer_store import OpenStore
from apportion.model.weights.parameters import ParameterReader, parameter_shapes
from apportion.model.weights.shard import Axis, Shape
from apportion.model.weights.streaming import MakeLayer, build_layers
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
    out_TND = kv_pool.attend(
        query_1NTD[0].transpose(0, 1),
        key_1KTD[0].transpose(0, 1),
        value_1KTD[0].transpose(0, 1),
        layer=module.layer_idx,
        batch=batch,
        scale=scaling,
        window_tokens=sliding_window,
        softcap=softcap,
        sinks_N=s_aux,
    )
    return out_TND[None], None


AttentionInterface.register(ATTENTION, _attend)


def import_family(folder: Path) -> None:
    """Imports transformers' code for the model in `folder`."""
    skeleton_of(read_config(folder))


def hf_modules(
    reader: ParameterReader,
    folder: Path,
    model: ModelSpec,
    stage: Stage,
    rank: int,
    all_reduce: AllReduce,
    open_store: OpenStore,
) -> StageModules:
    """Raises ModelError for a config that cannot be used."""
    config = read_config(folder)
    assert config.model_type == model.family
    configs = FamilyConfigs.of(config, model, reader.shares)
    skeleton = skeleton_of(configs.local)
    make = _layer_maker(type(skeleton.model.layers[0]), configs, model, stage, rank, all_reduce)
    layers, stream = build_layers(make, reader, model, stage, open_store)
    embedding = _embedding(skeleton.model.embed_tokens, reader, all_reduce) if stage.has_embedding else None
    return StageModules(
        layers=layers,
        stream=stream,
        rotaries=_rotaries(skeleton, configs.local, reader.backend.torch_device, stage),
        embedding=embedding,
        embedding_multiplier=getattr(config, "embedding_multiplier", 1.0),
        norm=_final_norm(skeleton.model.norm, reader) if stage.has_head else None,
        head=reader.head(embedding and embedding.table) if stage.has_head else None,
        logits_divisor=getattr(config, "logits_scaling", 1.0),
        logits_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _embedding(embedding: Any, reader: ParameterReader, all_reduce: AllReduce) -> VocabParallelEmbedding:
    table = reader.lookup_table(getattr(embedding, "scalar_embed_scale", 1.0))  # gemma's
    return VocabParallelEmbedding(table, reader.shares.vocab, all_reduce)


def _final_norm(norm: Any, reader: ParameterReader) -> nn.Module:
    norm.weight = nn.Parameter(reader.final_norm(), requires_grad=False)
    return norm


def _rotaries(skeleton: Any, config: Any, torch_device: torch.device, stage: Stage) -> list[Rotary]:
    """gemma3 rotates its sliding and its full layers by different frequencies; others have one set."""
    rotary = type(skeleton.model.rotary_emb)(config).to(torch_device)
    if not hasattr(rotary, "layer_types"):
        return [_rotary(rotary)] * stage.num_layers
    by_kind = {kind: _rotary(rotary, kind) for kind in rotary.layer_types}
    return [by_kind[kind] for kind in config.layer_types[stage.layer_start : stage.layer_stop]]


def _rotary(rotary: nn.Module, *kind: str) -> Rotary:
    def turns(positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return rotary(positions_T.new_empty(0, dtype=dtype), positions_T[None], *kind)

    return turns


def _layer_maker(
    layer_class: type[nn.Module],
    configs: FamilyConfigs,
    model: ModelSpec,
    stage: Stage,
    rank: int,
    all_reduce: AllReduce,
) -> MakeLayer:
    def make(reader: ParameterReader, index: int) -> nn.Module:
        with torch.device("meta"):
            layer = layer_class(configs.local, index)
            full = layer if stage.split.size == 1 else layer_class(configs.full, index)
            shrunk: dict[Axis, dict[str, Shape]] = {}
            if stage.split.size > 1:
                shrunk = {axis: parameter_shapes(layer_class(configs.shrunk[axis], index)) for axis in AXES}
        reader.layer(layer, index, parameter_shapes(full), shrunk)
        _install_reductions(layer, model, rank, all_reduce)
        return layer.eval()

    return make


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
