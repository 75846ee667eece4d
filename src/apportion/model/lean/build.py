"""Builds a stage of lean layers from the ModelSpec, the config and the checkpoint, without transformers.

Shapes follow from the ModelSpec: D = head dim, H = hidden size; the whole layer's: F = FFN columns, E = experts.
"""

from torch import Tensor

from apportion.model.decoder_stage import StageModules
from apportion.model.lean.config import LeanConfig
from apportion.model.lean.experts import Experts, Router
from apportion.model.lean.layers import Attention, FeedForward, LeanLayer, ReducedLinear
from apportion.model.lean.ops import ACTIVATIONS, Norm
from apportion.model.lean.reader import LayerReader
from apportion.model.reduction import AllReduce
from apportion.model.rope import Rope
from apportion.model.sharded_modules import VocabParallelEmbedding
from apportion.model.weights.layer_store import OpenStore
from apportion.model.weights.parameters import ParameterReader
from apportion.model.weights.shard import ShardedDim
from apportion.model.weights.streaming import build_layers
from apportion.types.model import ModelSpec
from apportion.types.plan import Stage


def lean_modules(
    reader: ParameterReader,
    config: LeanConfig,
    model: ModelSpec,
    stage: Stage,
    all_reduce: AllReduce,
    open_store: OpenStore,
) -> StageModules:
    def make(reader: ParameterReader, layer: int) -> LeanLayer:
        return lean_layer(reader, config, model, layer, all_reduce=all_reduce)

    layers, stream = build_layers(make, reader, model, stage, open_store)
    embedding = None
    if stage.has_embedding:
        table = reader.lookup_table(config.embedding_multiplier)
        embedding = VocabParallelEmbedding(table, reader.shares.vocab, all_reduce)
    full_rope = sliding_rope = Rope(config.rope, model.head_dim, reader.backend.torch_device)
    if config.sliding_rope is not None:
        sliding_rope = Rope(config.sliding_rope, model.head_dim, reader.backend.torch_device)
    return StageModules(
        layers=layers,
        stream=stream,
        rotaries=[
            sliding_rope if layer.window_tokens else full_rope
            for layer in model.layers[stage.layer_start : stage.layer_stop]
        ],
        embedding=embedding,
        norm=_norm(reader.final_norm(), config) if stage.has_head else None,
        head=reader.head(embedding and embedding.table) if stage.has_head else None,
        logits_softcap=config.logits_softcap,
    )


def lean_layer(
    reader: ParameterReader, config: LeanConfig, model: ModelSpec, layer: int, *, all_reduce: AllReduce
) -> LeanLayer:
    parts = _LayerParts(reader, config, model, layer, all_reduce)
    before_attention, between = parts.norm("input_layernorm"), parts.norm("post_attention_layernorm")
    attention_norms: tuple[Norm, Norm | None] = (before_attention, None)
    feed_forward_norms: tuple[Norm, Norm | None] = (between, None)
    if config.gemma:
        attention_norms = (before_attention, between)
        before, after = (parts.norm(f"{where}_feedforward_layernorm") for where in ("pre", "post"))
        feed_forward_norms = (before, after)
    return LeanLayer(
        attention=parts.attention(),
        feed_forward=parts.experts() if model.layers[layer].num_experts else parts.feed_forward(),
        attention_norms=attention_norms,
        feed_forward_norms=feed_forward_norms,
    )


class _LayerParts:
    def __init__(
        self, reader: ParameterReader, config: LeanConfig, model: ModelSpec, layer: int, all_reduce: AllReduce
    ) -> None:
        self._shares = reader.shares
        self._read = LayerReader(reader, layer)
        self._config, self._model = config, model
        self._layer, self._spec = layer, model.layers[layer]
        self._all_reduce = all_reduce

    def norm(self, name: str) -> Norm:
        size = self._model.head_dim if name.startswith("self_attn") else self._model.hidden_size
        return _norm(self._read.replicated(f"{name}.weight", size), self._config)

    def attention(self) -> Attention:
        model, heads = self._model, self._shares.heads
        q_rows, kv_rows = model.q_heads * model.head_dim, model.kv_heads * model.head_dim
        biased = self._spec.per_kv_head.others > 0
        norms = None
        if self._config.head_norms:
            norms = self.norm("self_attn.q_norm"), self.norm("self_attn.k_norm")
        project_in = self._read.column_parallel(
            {"self_attn.q_proj": q_rows, "self_attn.k_proj": kv_rows, "self_attn.v_proj": kv_rows},
            model.hidden_size,
            heads,
            biased=biased,
        )
        project_out = self._read.row_parallel(
            "self_attn.o_proj", model.hidden_size, q_rows, heads, biased=biased and self._config.output_bias
        )
        return Attention(
            layer=self._layer,
            kv_heads=heads.count,
            head_dim=model.head_dim,
            scale=self._config.attention_scale,
            window_tokens=self._spec.window_tokens,
            softcap=self._config.attention_softcap,
            project_in=project_in,
            project_out=ReducedLinear(project_out, self._all_reduce),
            norms=norms,
        )

    def feed_forward(self) -> FeedForward:
        hidden_size, ffn, width = self._model.hidden_size, self._shares.ffn, self._width()
        biased = self._spec.per_ffn_column.others > 0
        gate_up = self._read.column_parallel(
            {"mlp.gate_proj": width, "mlp.up_proj": width}, hidden_size, ffn, biased=biased
        )
        down = self._read.row_parallel("mlp.down_proj", hidden_size, width, ffn, biased=biased)
        return FeedForward(
            gate_up=gate_up,
            down=ReducedLinear(down, self._all_reduce),
            activation=ACTIVATIONS[self._config.activation],
        )

    def experts(self) -> Experts:
        num_experts, hidden_size, width = self._spec.num_experts, self._model.hidden_size, self._width()
        router = Router(
            weight_EH=self._read.replicated("mlp.gate.weight", num_experts, hidden_size),
            experts_per_token=self._spec.experts_per_token,
            normalised=self._config.normalised_experts,
        )
        ffn = self._shares.ffn
        return Experts(
            router=router,
            gate_up=self._read.experts(
                "mlp.experts.gate_up_proj",
                (num_experts, 2 * width, hidden_size),
                ShardedDim(dim=1, segments=(width, width), share=ffn),
            ),
            down=self._read.experts(
                "mlp.experts.down_proj",
                (num_experts, hidden_size, width),
                ShardedDim(dim=2, segments=(width,), share=ffn),
            ),
            activation=ACTIVATIONS[self._config.activation],
            all_reduce=self._all_reduce,
        )

    def _width(self) -> int:
        """Of the whole FFN, or of one of its experts: the columns' rows are those of gate and up."""
        rows = self._model.ffn_columns * self._spec.per_ffn_column.rows
        return rows // (2 * max(1, self._spec.num_experts))


def _norm(weight: Tensor, config: LeanConfig) -> Norm:
    return Norm(weight=weight.float() + 1 if config.gemma else weight, eps=config.norm_eps)
