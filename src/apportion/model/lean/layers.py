"""Decoder layers with one product for query, key and value and one for gate and up, for families that differ in little.

A layer is called like transformers' own; tests hold the two side by side. `build` makes it.

Shapes: T = tokens of the batch, H = hidden size, D = head dim; the member's: N = query heads, K = KV heads,
W = N + 2·K, F = FFN columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from apportion.model.batch import FlatBatch
from apportion.model.kv_pool import KVPool
from apportion.model.lean.ops import Norm, gated, split_heads
from apportion.model.reduction import AllReduce
from apportion.model.weights.linear import PackedLinear

Transform = Callable[[Tensor], Tensor]
"""x_TH -> y_TH"""


class ReducedLinear:
    """A product of which each member has a part: summed over the members, and then the bias is added once."""

    def __init__(self, linear: PackedLinear, all_reduce: AllReduce) -> None:
        self.bias_H, linear.bias = linear.bias, None
        self.linear = linear
        self.all_reduce = all_reduce

    def __call__(self, x: Tensor) -> Tensor:
        out_TH = self.all_reduce(self.linear(x))
        return out_TH if self.bias_H is None else out_TH + self.bias_H


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

    @property
    def heads(self) -> int:
        return self.project_in.out_features // self.head_dim - 2 * self.kv_heads

    def __call__(
        self, x_TH: Tensor, rotation: tuple[Tensor, Tensor], batch: FlatBatch, kv_pool: KVPool
    ) -> Tensor:
        projected_TWD = self.project_in(x_TH).view(len(x_TH), -1, self.head_dim)
        query_TND, key_TKD, value_TKD = split_heads(projected_TWD, self.kv_heads, rotation, self.norms)
        del projected_TWD  # attention needs only the copies
        return self.project_out(self.attend(query_TND, key_TKD, value_TKD, batch, kv_pool).flatten(1))

    def attend(
        self,
        query_TND: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        batch: FlatBatch,
        kv_pool: KVPool,
        out_TND: Tensor | None = None,
    ) -> Tensor:
        """out_TND, in new memory where none is given"""
        return kv_pool.attend(
            query_TND,
            key_TKD,
            value_TKD,
            layer=self.layer,
            batch=batch,
            scale=self.scale,
            window_tokens=self.window_tokens,
            softcap=self.softcap,
            sinks_N=None,
            out_TND=out_TND,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    gate_up: PackedLinear
    down: ReducedLinear
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x_TH: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x_TH), self.activation))


class LeanLayer(nn.Module):
    """Called like a layer of transformers, where it is not compiled (`program`)."""

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
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_norms, self.feed_forward_norms = attention_norms, feed_forward_norms

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
        before, after = self.attention_norms
        attended_TH = self.attention(before(hidden_TH), position_embeddings, batch, kv_pool)
        hidden_TH = hidden_TH + (attended_TH if after is None else after(attended_TH))
        before, after = self.feed_forward_norms
        forwarded_TH = self.feed_forward(before(hidden_TH))
        return hidden_TH.add_(forwarded_TH if after is None else after(forwarded_TH))[None]
