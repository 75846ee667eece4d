"""Decoder layers with one product for query, key and value and one for gate and up, for families that differ in little.

A layer is called like transformers' own; tests hold the two side by side. `lean_build` makes it.

Shapes: T = tokens of the batch, H = hidden size, D = head dim; the member's: N = query heads, K = KV heads,
W = N + 2·K, F = FFN columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from apportion.model.attention import paged_attention
from apportion.model.batch import FlatBatch
from apportion.model.kv_pool import KVPool
from apportion.model.lean_ops import Norm, gated, split_heads
from apportion.model.linear import PackedLinear
from apportion.model.sharded_modules import AllReduce

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
