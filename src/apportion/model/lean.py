"""Decoder layers with one product for query, key and value and one for gate and up, for families that differ in little.

A layer is made from transformers' own on the meta device, which says what there is (norms, biases, activation,
scale), and is called like it; tests hold the two side by side.

Shapes: T = tokens of the batch, H = hidden size, D = head dim; the member's: N = query heads, K = KV heads,
W = N + 2·K, F = FFN columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from apportion.model.attention import paged_attention
from apportion.model.batch import FlatBatch
from apportion.model.kv_pool import KVPool
from apportion.model.lean_experts import Experts, Router
from apportion.model.lean_ops import Norm, gated, split_heads
from apportion.model.lean_reader import LayerReader
from apportion.model.linear import PackedLinear
from apportion.model.parameters import ParameterReader
from apportion.model.shard import Axis, Shape
from apportion.model.sharded_modules import AllReduce
from apportion.model.weights import Weights
from apportion.types.model import ModelSpec
from apportion.types.plan import Stage

LEAN_FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"}
)

Transform = Callable[[Tensor], Tensor]
"""x_TH -> y_TH"""


class ReducedLinear:
    """A product of which each member has a part: summed over the members, and then the bias is added once."""

    def __init__(self, linear: PackedLinear, all_reduce: AllReduce) -> None:
        self._bias_H, linear.bias = linear.bias, None
        self._linear = linear
        self._all_reduce = all_reduce

    def __call__(self, x: Tensor) -> Tensor:
        out_TH = self._all_reduce(self._linear(x))
        return out_TH if self._bias_H is None else out_TH + self._bias_H


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    layer: int
    kv_heads: int
    head_dim: int
    scale: float
    window_tokens: int | None
    softcap: float | None
    project_in: PackedLinear
    project_out: ReducedLinear
    norms: tuple[Norm, Norm] | None
    """The query's and the key's."""

    def __call__(
        self, x_TH: Tensor, rotation: tuple[Tensor, Tensor], batch: FlatBatch, kv_pool: KVPool
    ) -> Tensor:
        out_TND = paged_attention(
            # No name holds the projections: attention needs only the copies.
            *split_heads(
                self.project_in(x_TH).view(len(x_TH), -1, self.head_dim), self.kv_heads, rotation, self.norms
            ),
            layer=self.layer,
            batch=batch,
            kv_pool=kv_pool,
            scale=self.scale,
            window_tokens=self.window_tokens,
            softcap=self.softcap,
            sinks_N=None,
        )
        return self.project_out(out_TND.flatten(1))


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    gate_up: PackedLinear
    down: ReducedLinear
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x_TH: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x_TH), self.activation))


class LeanLayer(nn.Module):
    """Called like a layer of transformers."""

    def __init__(
        self,
        *,
        attention: Attention,
        feed_forward: Transform,
        attention_norms: tuple[Norm, Norm | None],
        feed_forward_norms: tuple[Norm, Norm | None],
    ) -> None:
        """Norms stand before and, in gemma, after each half."""
        super().__init__()
        self._attention, self._feed_forward = attention, feed_forward
        self._attention_norms, self._feed_forward_norms = attention_norms, feed_forward_norms

    def forward(
        self,
        hidden_1TH: Tensor,
        *,
        attention_mask: None,
        position_embeddings: tuple[Tensor, Tensor],
        batch: FlatBatch,
        kv_pool: KVPool,
    ) -> Tensor:
        assert attention_mask is None
        hidden_TH = hidden_1TH[0]
        before, after = self._attention_norms
        attended_TH = self._attention(before(hidden_TH), position_embeddings, batch, kv_pool)
        if after is not None:
            attended_TH = after.in_place(attended_TH)
        before, after = self._feed_forward_norms
        normed_TH = before.of_sum(hidden_TH, attended_TH)  # attended_TH now holds the sum
        forwarded_TH = self._feed_forward(normed_TH)
        if after is not None:
            forwarded_TH = after.in_place(forwarded_TH)
        return forwarded_TH.add_(attended_TH)[None]


def can_be_lean(model: ModelSpec, stage: Stage, weights: Weights) -> bool:
    """All experts in one tensor, which no published checkpoint has, are left to transformers' layers."""
    whole_experts = f"model.layers.{stage.layer_start}.mlp.experts.gate_up_proj"
    return model.family in LEAN_FAMILIES and whole_experts not in weights


def lean_layer(
    parameters: ParameterReader,
    model: ModelSpec,
    all_reduce: AllReduce,
    original: Any,
    full: dict[str, Shape],
    shrunk: dict[Axis, dict[str, Shape]],
) -> LeanLayer:
    """From transformers' own layer of a member's share, on the meta device, its parameters' full shapes, and their
    shapes with each axis shrunk."""
    reader = LayerReader(parameters, original, original.self_attn.layer_idx, full, shrunk)
    gemma = hasattr(original, "pre_feedforward_layernorm")
    norms = {
        name: _norm(module, name, reader, gemma)
        for name, module in original.named_children()
        if name.endswith("layernorm")
    }
    after_attention = norms["post_attention_layernorm"]
    return LeanLayer(
        attention=_attention(original.self_attn, reader, model, all_reduce, gemma),
        feed_forward=_feed_forward(original.mlp, reader, all_reduce),
        attention_norms=(norms["input_layernorm"], after_attention if gemma else None),
        feed_forward_norms=(norms["pre_feedforward_layernorm"], norms["post_feedforward_layernorm"])
        if gemma
        else (after_attention, None),
    )


def _norm(module: Any, name: str, reader: LayerReader, gemma: bool) -> Norm:
    weight = reader.vector(f"{name}.weight")
    if not gemma:
        return Norm(weight=weight, eps=module.variance_epsilon)
    return Norm(weight=weight.float() + 1, eps=module.eps)  # gemma stores what is added to 1


def _attention(
    original: Any, reader: LayerReader, model: ModelSpec, all_reduce: AllReduce, gemma: bool
) -> Attention:
    names = [f"self_attn.{part}_proj" for part in ("q", "k", "v")]
    query_norm, key_norm = (
        _norm(getattr(original, name), f"self_attn.{name}", reader, gemma)
        if hasattr(original, name)
        else None
        for name in ("q_norm", "k_norm")
    )
    return Attention(
        layer=original.layer_idx,
        kv_heads=reader.kv_heads,
        head_dim=model.head_dim,
        scale=original.scaling,
        window_tokens=model.layers[original.layer_idx].window_tokens,
        softcap=original.attn_logit_softcapping if model.family == "gemma2" else None,
        project_in=reader.linear(*names),
        project_out=ReducedLinear(reader.linear("self_attn.o_proj"), all_reduce),
        norms=(query_norm, key_norm) if query_norm and key_norm else None,
    )


def _feed_forward(original: Any, reader: LayerReader, all_reduce: AllReduce) -> Transform:
    if not hasattr(original, "experts"):
        return FeedForward(
            gate_up=reader.linear("mlp.gate_proj", "mlp.up_proj"),
            down=ReducedLinear(reader.linear("mlp.down_proj"), all_reduce),
            activation=original.act_fn,
        )
    router = Router(
        weight_EH=reader.vector("mlp.gate.weight"),
        experts_per_token=original.gate.top_k,
        normalised=getattr(original.gate, "norm_topk_prob", True),
    )
    return Experts(
        router=router,
        gate_up=reader.experts("mlp.experts.gate_up_proj"),
        down=reader.experts("mlp.experts.down_proj"),
        activation=original.experts.act_fn,
        all_reduce=all_reduce,
    )
