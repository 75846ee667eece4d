"""A stage made of transformers' own decoder layers: the only file that touches transformers' internals.

Each layer is built on the meta device from a config shrunk to the member's share, and its parameters are then
read one at a time. Attention goes to the paged pool through `AttentionInterface`.

Shapes: T = tokens of the batch, H = hidden size; the member's share of: N = query heads, K = KV heads,
V = vocabulary rows; D = head dim.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging as transformers_logging

from apportion.model.attention import paged_attention
from apportion.model.batch import FlatBatch
from apportion.model.hf_stage import HfStage, StageModules
from apportion.model.kv_pool import KVPool
from apportion.model.shard import (
    Axis,
    Placement,
    RankShares,
    Shape,
    ShardedDim,
    placements,
    sharded_dim,
    whole_placements,
)
from apportion.model.sharded_modules import AllReduce, RowParallelLinear, VocabParallelEmbedding, WideRMSNorm
from apportion.model.stage import StageModel
from apportion.model.weights import FORMAT_DTYPES, Checkpoint
from apportion.types.model import ModelSpec
from apportion.types.plan import Stage

_ATTENTION = "apportion_paged"
_EMBEDDING_NAME = "model.embed_tokens.weight"
_HEAD_NAME = "lm_head.weight"
_AXES: tuple[Axis, ...] = ("heads", "ffn")

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


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


AttentionInterface.register(_ATTENTION, _attend)


def build_hf_stage(
    folder: Path,
    model: ModelSpec,
    stage: Stage,
    rank: int,
    *,
    num_kv_blocks: int,
    block_tokens: int,
    all_reduce: AllReduce,
    torch_device: str,
    observe_memory: Callable[[], None],
) -> StageModel:
    """Member `rank` of `stage`, read from the checkpoint in `folder`: weights first, then the KV pool.

    `all_reduce` sums over the members (identity for one); `observe_memory` is called after each allocation.
    Raises ModelError for a checkpoint that cannot be used.
    """
    shares = RankShares.of(model, stage, rank)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    assert config.model_type == model.family
    reader = _Reader(Checkpoint(folder), model, stage, shares, torch_device, observe_memory)
    modules = _build_modules(_Configs.of(config, model, shares), reader, model, stage, rank, all_reduce)
    pool = KVPool(
        layer_start=stage.layer_start,
        num_layers=stage.num_layers,
        num_blocks=num_kv_blocks,
        block_tokens=block_tokens,
        kv_heads=shares.heads.count,
        head_dim=model.head_dim,
        dtype=reader.dtype,
        torch_device=torch_device,
    )
    observe_memory()
    return HfStage(
        config,
        modules,
        pool,
        parameters=reader.parameters,
        weights_bytes=reader.parameters * reader.dtype.itemsize,
        read_bytes=reader.checkpoint.read_bytes,
    )


def _build_modules(
    configs: "_Configs",
    reader: "_Reader",
    model: ModelSpec,
    stage: Stage,
    rank: int,
    all_reduce: AllReduce,
) -> StageModules:
    skeleton = _skeleton(configs.local)
    layers = _build_layers(type(skeleton.model.layers[0]), configs, reader, stage)
    for layer in layers:
        _install_reductions(layer, model, rank, all_reduce)
    embedding = reader.embedding(skeleton.model.embed_tokens, all_reduce) if stage.has_embedding else None
    rotary = type(skeleton.model.rotary_emb)(configs.local).to(reader.torch_device)
    return StageModules(
        layers=layers,
        rotary=rotary,
        rotary_kinds=_rotary_kinds(rotary, configs.local, stage),
        embedding=embedding,
        norm=reader.final_norm(skeleton.model.norm) if stage.has_head else None,
        head_weight_VH=reader.head_weight(embedding) if stage.has_head else None,
    )


def _rotary_kinds(rotary: nn.Module, config: PreTrainedConfig, stage: Stage) -> list[str] | None:
    """gemma3 rotates its sliding and its full layers by different frequencies; others have one set."""
    if not hasattr(rotary, "layer_types"):
        return None
    return list(getattr(config, "layer_types")[stage.layer_start : stage.layer_stop])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Configs:
    """A model's config as it is, shrunk to a member's share, and shrunk along one axis alone."""

    full: PreTrainedConfig
    local: PreTrainedConfig
    shrunk: dict[Axis, PreTrainedConfig]

    @classmethod
    def of(cls, config: PreTrainedConfig, model: ModelSpec, shares: RankShares) -> "_Configs":
        return cls(
            full=_shrunk_config(config, model, shares, ()),
            local=_shrunk_config(config, model, shares, _AXES),
            shrunk={axis: _shrunk_config(config, model, shares, (axis,)) for axis in _AXES},
        )


def _shrunk_config(
    config: PreTrainedConfig, model: ModelSpec, shares: RankShares, axes: tuple[Axis, ...]
) -> PreTrainedConfig:
    shrunk: Any = copy.deepcopy(config)
    shrunk.head_dim = model.head_dim  # some families derive it from the number of heads
    shrunk._attn_implementation = _ATTENTION
    shrunk._experts_implementation = "eager"
    if "heads" in axes:
        shrunk.num_key_value_heads = shares.heads.count
        shrunk.num_attention_heads = shares.heads.count * model.q_heads_per_kv_head
    if "ffn" in axes:
        for field in ("intermediate_size", "moe_intermediate_size"):
            if getattr(config, field, None) is not None:
                setattr(shrunk, field, shares.ffn.scaled(getattr(config, field)))
    return shrunk


def _skeleton(config: PreTrainedConfig) -> Any:
    """A model of one layer on the meta device, for the classes and the modules around the layers."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    small.pad_token_id = None  # it marks a row of the embedding, which the member may not hold
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(small)


def _build_layers(
    layer_class: type[nn.Module], configs: _Configs, reader: "_Reader", stage: Stage
) -> list[nn.Module]:
    layers = []
    for index in range(stage.layer_start, stage.layer_stop):
        with torch.device("meta"):
            layer = layer_class(configs.local, index)
            full = layer if stage.split.size == 1 else layer_class(configs.full, index)
            shrunk: dict[Axis, dict[str, Shape]] = {}
            if stage.split.size > 1:
                shrunk = {axis: _shapes(layer_class(configs.shrunk[axis], index)) for axis in _AXES}
        reader.layer(layer.eval(), index, _shapes(full), shrunk)
        layers.append(layer)
    return layers


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


class _Reader:
    """Gives modules on the meta device their parameters, one at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: ModelSpec,
        stage: Stage,
        shares: RankShares,
        torch_device: str,
        observe_memory: Callable[[], None],
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = FORMAT_DTYPES[stage.weight_format]
        self.torch_device = torch_device
        self.parameters = 0
        self._model = model
        self._shares = shares
        self._observe_memory = observe_memory

    def layer(
        self, layer: nn.Module, index: int, full: dict[str, Shape], shrunk: dict[Axis, dict[str, Shape]]
    ) -> None:
        prefix = f"model.layers.{index}."
        for name, shape in _shapes(layer).items():
            shrunk_shapes: dict[Axis, Shape] = {axis: shapes[name] for axis, shapes in shrunk.items()}
            sharded = sharded_dim(name, full[name], shrunk_shapes, self._model, self._shares)
            reads = placements(prefix, name, self._model.family, self.checkpoint, full[name], sharded)
            module_name, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(module_name), leaf, self._read(shape, reads))

    def embedding(self, embedding: Any, all_reduce: AllReduce) -> VocabParallelEmbedding:
        embedding.weight = self._vocab_table(_EMBEDDING_NAME)
        if hasattr(embedding, "embed_scale"):  # gemma
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=self.torch_device)
        vocab = self._shares.vocab
        return VocabParallelEmbedding(embedding, vocab.start, vocab.units, all_reduce)

    def head_weight(self, embedding: VocabParallelEmbedding | None) -> Tensor:
        if not self._model.tied_embeddings:
            return self._vocab_table(_HEAD_NAME)
        return self._vocab_table(_EMBEDDING_NAME) if embedding is None else embedding.embedding.weight

    def final_norm(self, norm: nn.Module) -> nn.Module:
        shape: Shape = (self._model.hidden_size,)
        norm.weight = self._read(shape, whole_placements("model.norm.weight", shape, None))
        return norm

    def _vocab_table(self, name: str) -> nn.Parameter:
        full: Shape = (self._model.vocab_rows, self._model.hidden_size)
        sharded = ShardedDim(dim=0, segments=(self._model.vocab_rows,), share=self._shares.vocab)
        return self._read((self._shares.vocab.count, full[1]), whole_placements(name, full, sharded))

    def _read(self, shape: Shape, reads: Iterable[Placement]) -> nn.Parameter:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.torch_device)
        for read in reads:
            self.checkpoint.check_shape(read.source, read.source_shape)
            self.checkpoint.read_into(tensor[read.target], read.source, read.ranges)
        self.parameters += tensor.numel()
        self._observe_memory()
        return nn.Parameter(tensor, requires_grad=False)


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
