"""Makes the table of operations of a stage's layers (`lean_program`).

Shapes: T = tokens of the batch, H = hidden size, D = head dim; the member's: N = query heads, K = KV heads,
W = N + 2·K, F = FFN columns.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from apportion.model import lean_kernels
from apportion.model.attend_op import NO_WINDOW, DecodeOperand, attend_op
from apportion.model.cpu_products import PackedProduct
from apportion.model.kv_pool import KVPool
from apportion.model.lean import Attention, FeedForward, LeanLayer, ReducedLinear, Transform
from apportion.model.lean_ops import Norm, gate_coefficients
from apportion.model.lean_program import Between, Half, LeanProgram, Step
from apportion.model.linear import PackedLinear
from apportion.model.op_table import OpTable, Place
from apportion.model.sharded_modules import AllReduce
from apportion.model.streaming import Layer, StreamedLayer
from apportion.model.team import team_of


def lean_program(
    layers: Sequence[Layer], kv_pool: KVPool, hidden_size: int, *, grouped: bool, first_buffer: int
) -> LeanProgram | None:
    """Of a step whose first streamed layer arrives in buffer `first_buffer`; None without lean layers. `grouped`: the
    device is one of several members. Layers of transformers' own are called where they stand."""
    arrived = [layer.in_step(first_buffer) if isinstance(layer, StreamedLayer) else layer for layer in layers]
    if not any(isinstance(layer, LeanLayer) for layer in arrived):
        return None
    compiler = _Compiler(kv_pool, hidden_size, grouped=grouped)
    for index, (layer, lean) in enumerate(zip(layers, arrived, strict=True)):
        if not isinstance(lean, LeanLayer):
            compiler.other_layer(index, layer)
            continue
        if isinstance(layer, StreamedLayer):
            compiler.arrival(layer)
        compiler.lean_layer(index, lean)
    return compiler.program()


class _Compiler:
    def __init__(self, kv_pool: KVPool, hidden_size: int, *, grouped: bool) -> None:
        self._pool, self._grouped = kv_pool, grouped
        self._table = OpTable(team_of(torch.get_num_threads()))
        self._decode = DecodeOperand()
        self._halves: list[Half] = []
        self._splits: list[tuple[int, int]] = []
        self._hidden, self._normed, self._partial = (Place.in_step(n * hidden_size) for n in range(3))
        self._hidden_size = hidden_size
        self._is_pending = False
        """Whether a partial result is still to be added to the hidden state."""

    def program(self) -> LeanProgram:
        self._add_pending()
        self._end_half(0, None)
        self._table.finish()
        return LeanProgram(
            table=self._table,
            halves=self._halves,
            splits=self._splits,
            decode=self._decode,
            kv_pool=self._pool,
        )

    def arrival(self, layer: StreamedLayer) -> None:
        def arrive(_: Step) -> None:
            layer.arrive()

        self._end_half(0, arrive)

    def lean_layer(self, index: int, layer: LeanLayer) -> None:
        before, after = layer.attention_norms
        self._norm_hidden(before)
        self._attention(index, layer.attention)
        self._after(after, layer.attention.project_out.bias_H)
        before, after = layer.feed_forward_norms
        self._norm_hidden(before)
        bias_H = self._feed_forward(layer.feed_forward)
        self._after(after, bias_H)

    def other_layer(self, index: int, layer: Callable[..., Tensor]) -> None:
        def forward(step: Step) -> None:
            hidden_1TH = layer(
                step.hidden_TH[None],
                attention_mask=None,
                position_embeddings=step.rotations[index],
                batch=step.batch,
                kv_pool=step.kv_pool,
            )
            step.hidden_TH.copy_(hidden_1TH[0])

        self._add_pending()
        self._end_half(0, forward)

    def _norm_hidden(self, norm: Norm) -> None:
        """Of the hidden state, once the last partial result is added to it."""
        if self._is_pending:
            places = {"x": self._partial, "y": self._hidden}
            self._table.add(lean_kernels.add_norm, _operands(norm), out=self._normed, **places)
        else:
            self._table.add(lean_kernels.norm, _operands(norm), x=self._hidden, out=self._normed)
        self._is_pending = False

    def _add_pending(self) -> None:
        if self._is_pending:
            self._table.add(lean_kernels.add, {"width": self._hidden_size}, x=self._partial, y=self._hidden)
        self._is_pending = False

    def _after(self, norm: Norm | None, bias_H: Tensor | None) -> None:
        """What a partial result gets once it is reduced."""
        if bias_H is not None:
            operands = {"width": self._hidden_size, "bias": bias_H.data_ptr()}
            self._table.add(lean_kernels.add_bias, operands, y=self._partial)
        if norm is not None:
            self._table.add(lean_kernels.norm, _operands(norm), x=self._partial, out=self._partial)
        self._is_pending = True

    def _attention(self, index: int, attention: Attention) -> None:
        width, head_dim = attention.project_in.out_features, attention.head_dim
        key_width = attention.kv_heads * head_dim
        projected, query = Place.in_half(0), Place.in_half(width)
        attended = projected
        key, value = Place.in_half(2 * width - 2 * key_width), Place.in_half(2 * width - key_width)
        self._product(attention.project_in, self._normed, projected)
        split = self._table.add(
            lean_kernels.split, _split_operands(attention), x=projected, y=query, z=key, out=value
        )
        self._splits.append((split, index))
        attend = attend_op(self._pool.elements)
        number = self._table.add(
            attend, self._attend_operands(attention), x=query, y=key, z=value, out=attended
        )
        self._product(attention.project_out.linear, attended, self._partial)
        then = self._reduction(attention.project_out)
        self._end_half(2 * width, then, attend=number, attention=attention)

    def _attend_operands(self, attention: Attention) -> dict[str, float]:
        keys_KSD, values_KSD = self._pool.arrays(attention.layer)
        return {
            "decode": self._decode.address,
            "keys": keys_KSD.ctypes.data,
            "values": values_KSD.ctypes.data,
            "beyond": self._pool.beyond_1.ctypes.data,
            "slots": keys_KSD.shape[1],
            "kv_heads": attention.kv_heads,
            "group": attention.heads // attention.kv_heads,
            "head_dim": attention.head_dim,
            "window_tokens": attention.window_tokens or NO_WINDOW,
            "scale": attention.scale,
            "softcap": attention.softcap or 0.0,
        }

    def _feed_forward(self, feed_forward: Transform) -> Tensor | None:
        """Returns the bias that its reduced result still gets."""
        coefficients = None
        if isinstance(feed_forward, FeedForward):
            coefficients = gate_coefficients(feed_forward.activation)
        if not isinstance(feed_forward, FeedForward) or coefficients is None:
            self._end_half(0, lambda step: _transform(feed_forward, step))
            return None
        both, columns = feed_forward.gate_up.out_features, feed_forward.gate_up.out_features // 2
        gate_up, gated = Place.in_half(0), Place.in_half(both)
        linear, cubic = coefficients
        self._product(feed_forward.gate_up, self._normed, gate_up)
        operands = {"columns": columns, "linear": linear, "cubic": cubic}
        self._table.add(lean_kernels.gate, operands, x=gate_up, out=gated)
        self._product(feed_forward.down.linear, gated, self._partial)
        self._end_half(both + columns, self._reduction(feed_forward.down))
        return feed_forward.down.bias_H

    def _product(self, linear: PackedLinear, x: Place, out: Place) -> None:
        product = linear.product
        assert isinstance(product, PackedProduct)
        bias = 0 if linear.bias is None else linear.bias.data_ptr()
        self._table.add(product.op, {**product.operands, "bias": bias}, x=x, out=out)

    def _reduction(self, reduced: ReducedLinear) -> Between | None:
        return partial(_reduce, reduced.all_reduce) if self._grouped else None

    def _end_half(
        self,
        scratch_floats: int,
        then: Between | None,
        attend: int | None = None,
        attention: Attention | None = None,
    ) -> None:
        first = self._halves[-1].stop if self._halves else 0
        self._halves.append(
            Half(
                first=first,
                stop=len(self._table),
                scratch_floats=scratch_floats,
                attend=attend,
                attention=attention,
                then=then,
            )
        )


def _operands(norm: Norm) -> dict[str, float]:
    return {"weight": norm.weight.data_ptr(), "width": len(norm.weight), "eps": norm.eps}


def _split_operands(attention: Attention) -> Mapping[str, float]:
    heads = {"heads": attention.heads, "kv_heads": attention.kv_heads, "head_dim": attention.head_dim}
    if attention.norms is None:
        return heads
    query, key = attention.norms
    weights = {"query_weight": query.weight.data_ptr(), "key_weight": key.weight.data_ptr()}
    return {**heads, **weights, "eps": query.eps}


def _reduce(all_reduce: AllReduce, step: Step) -> None:
    step.partial_TH.copy_(all_reduce(step.partial_TH))


def _transform(feed_forward: Transform, step: Step) -> None:
    """It reduces by itself."""
    step.partial_TH.copy_(feed_forward(step.normed_TH))
