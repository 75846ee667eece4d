"""Makes the table of operations of a stage's layers (`program`).

Shapes: T = tokens of the batch, H = hidden size, D = head dim; the member's: N = query heads, K = KV heads,
W = N + 2·K, F = FFN columns.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from apportion.model.backends.cpu.pool import CpuPool
from apportion.model.backends.cpu.products import PackedProduct
from apportion.model.backends.cpu.program import Between, Half, LeanProgram, Step
from apportion.model.kernels import layer as lean_kernels
from apportion.model.kernels.attend_op import NO_WINDOW, attend_op
from apportion.model.kernels.kv_elements import ELEMENT_TYPES
from apportion.model.kernels.look_up_op import look_up_op
from apportion.model.kernels.op_code import Op
from apportion.model.kernels.op_table import OpTable, Place
from apportion.model.kernels.step_operand import StepOperand
from apportion.model.kernels.team import team_of
from apportion.model.lean.layers import Attention, FeedForward, LeanLayer, ReducedLinear, Transform
from apportion.model.lean.ops import Norm, gate_coefficients
from apportion.model.reduction import CompiledAllReduce
from apportion.model.rope import Rope
from apportion.model.sharded_modules import VocabParallelEmbedding
from apportion.model.weights.linear import PackedLinear
from apportion.model.weights.streaming import Layer, StreamedLayer
from apportion.model.weights.vocabulary import LookupTable


def lean_program(
    layers: Sequence[Layer],
    ropes: Sequence[Rope],
    kv_pool: CpuPool,
    hidden_size: int,
    *,
    embedding: VocabParallelEmbedding | None,
    norm: Norm | None,
    all_reduce: CompiledAllReduce | None,
    first_buffer: int,
) -> LeanProgram | None:
    """Of a step whose first streamed layer arrives in buffer `first_buffer`; None where not all are lean layers. From
    the `embedding` and to the final `norm` where the stage has them; `all_reduce` where the device is one of several
    members."""
    compiler = _Compiler(kv_pool, hidden_size, all_reduce)
    compiler.begin(embedding)
    for layer, rope in zip(layers, ropes, strict=True):
        arrived = layer
        if isinstance(layer, StreamedLayer):
            arrived = layer.in_step(first_buffer)
            compiler.arrival(layer)
        if not isinstance(arrived, LeanLayer):
            return None
        compiler.lean_layer(arrived, rope)
    return compiler.program(norm)


class _Compiler:
    def __init__(self, kv_pool: CpuPool, hidden_size: int, all_reduce: CompiledAllReduce | None) -> None:
        self._pool, self._all_reduce = kv_pool, all_reduce
        self._table, self._operand = OpTable(team_of(torch.get_num_threads())), StepOperand()
        self._halves: list[Half] = []
        self._hidden, self._normed, self._partial = (Place.in_step(n * hidden_size) for n in range(3))
        self._step_floats = 3 * hidden_size
        self._hidden_size = hidden_size
        self._turns: dict[Rope, tuple[Place, Place]] = {}
        self._is_pending = False
        """Whether a partial result is still to be added to the hidden state."""

    def begin(self, embedding: VocabParallelEmbedding | None) -> None:
        source = {"source": self._operand.input_address, "width": self._hidden_size}
        if embedding is None:
            self._table.add(lean_kernels.take, source, out=self._hidden)
            return
        op, operands = look_up(embedding.table, embedding.vocab.start)
        self._table.add(op, {**source, **operands}, out=self._hidden)
        if self._all_reduce is not None:
            self._add_reduction(self._all_reduce, self._hidden)

    def program(self, norm: Norm | None) -> LeanProgram:
        if norm is None:
            self._add_pending()
        else:
            self._norm_hidden(norm)
        self._end_half(0)
        self._table.finish()
        return LeanProgram(
            table=self._table,
            operand=self._operand,
            halves=self._halves,
            step_floats=self._step_floats,
            kv_pool=self._pool,
            all_reduce=self._all_reduce,
            hidden_size=self._hidden_size,
            normed=norm is not None,
        )

    def arrival(self, layer: StreamedLayer) -> None:
        def arrive(_: Step) -> None:
            layer.arrive()

        self._end_half(0, then=arrive)

    def lean_layer(self, layer: LeanLayer, rope: Rope) -> None:
        before, after = layer.attention_norms
        self._norm_hidden(before)
        self._attention(layer.attention, self._turned(rope, layer.attention.head_dim))
        self._after(after, layer.attention.project_out.bias_H)
        before, after = layer.feed_forward_norms
        self._norm_hidden(before)
        bias_H = self._feed_forward(layer.feed_forward)
        self._after(after, bias_H)

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

    def _attention(self, attention: Attention, turns: tuple[Place, Place]) -> None:
        width = attention.project_in.out_features
        cos, sin = turns
        projected, query_key_value = Place.in_half(0), Place.in_half(width)
        attended = projected
        self._product(attention.project_in, self._normed, projected)
        operands = _split_operands(attention)
        self._table.add(lean_kernels.split, operands, x=projected, y=cos, z=sin, out=query_key_value)
        op, operands = attend_op(self._pool.elements), self._attend_operands(attention)
        number = self._table.add(op, operands, x=query_key_value, out=attended)
        self._reduced_product(attention.project_out, attended)
        self._end_half(2 * width, attend=number, attention=attention)

    def _turned(self, rope: Rope, head_dim: int) -> tuple[Place, Place]:
        """Where its cos and sin lie."""
        if rope in self._turns:
            return self._turns[rope]
        cos, sin = (Place.in_step(self._step_floats + n * head_dim) for n in range(2))
        self._turns[rope], self._step_floats = (cos, sin), self._step_floats + 2 * head_dim
        operands = {
            "positions": self._operand.positions_address,
            "frequencies": rope.frequencies_F.data_ptr(),
            "head_dim": head_dim,
            "amplitude": rope.amplitude,
        }
        self._table.add(lean_kernels.turns, operands, x=cos, y=sin)
        return cos, sin

    def _attend_operands(self, attention: Attention) -> dict[str, float]:
        keys_KSD, values_KSD = self._pool.arrays(attention.layer)
        return {
            "step": self._operand.address,
            "keys": keys_KSD.ctypes.data,
            "values": values_KSD.ctypes.data,
            "beyond": self._pool.tensors.beyond_1.ctypes.data,
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
            self._end_half(0, then=lambda step: _transform(feed_forward, step))
            return None
        both, columns = feed_forward.gate_up.out_features, feed_forward.gate_up.out_features // 2
        gate_up, gated = Place.in_half(0), Place.in_half(both)
        linear, cubic = coefficients
        self._product(feed_forward.gate_up, self._normed, gate_up)
        operands = {"columns": columns, "linear": linear, "cubic": cubic}
        self._table.add(lean_kernels.gate, operands, x=gate_up, out=gated)
        self._reduced_product(feed_forward.down, gated)
        self._end_half(both + columns)
        return feed_forward.down.bias_H

    def _product(self, linear: PackedLinear, x: Place, out: Place) -> None:
        product = linear.product
        assert isinstance(product, PackedProduct)
        bias = 0 if linear.bias is None else linear.bias.data_ptr()
        self._table.add(product.op, {**product.operands, "bias": bias}, x=x, out=out)

    def _reduced_product(self, reduced: ReducedLinear, x: Place) -> None:
        one = self._all_reduce
        if one is not None and one.pause is not None:
            self._table.add(lean_kernels.pause, {"function": one.pause, "context": one.context})
        self._product(reduced.linear, x, self._partial)
        if one is not None:
            self._add_reduction(one, self._partial)

    def _add_reduction(self, one: CompiledAllReduce, x: Place) -> None:
        operands = {"function": one.function, "context": one.context, "width": self._hidden_size}
        self._table.add(lean_kernels.reduce, operands, x=x)

    def _end_half(
        self,
        scratch_floats: int,
        *,
        then: Between | None = None,
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


def look_up(table: LookupTable, first_row: int) -> tuple[Op, Mapping[str, float]]:
    """Of the rows from `first_row` on; others are zeros."""
    rows_VH = table.rows_VH
    if rows_VH.dtype != torch.int8:
        rows_VH = rows_VH.view(ELEMENT_TYPES[rows_VH.dtype])
    operands = {
        "table": rows_VH.data_ptr(),
        "scales": 0 if table.scales_V is None else table.scales_V.data_ptr(),
        "first_row": first_row,
        "num_rows": len(rows_VH),
        "multiplier": table.multiplier,
    }
    return look_up_op(rows_VH.numpy().dtype), operands


def _split_operands(attention: Attention) -> Mapping[str, float]:
    heads = {"heads": attention.heads, "kv_heads": attention.kv_heads, "head_dim": attention.head_dim}
    if attention.norms is None:
        return heads
    query, key = attention.norms
    weights = {"query_weight": query.weight.data_ptr(), "key_weight": key.weight.data_ptr()}
    return {**heads, **weights, "eps": query.eps}


def _transform(feed_forward: Transform, step: Step) -> None:
    """It reduces by itself."""
    step.partial_TH.copy_(feed_forward(step.normed_TH))
