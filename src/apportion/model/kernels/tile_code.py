"""The inner loop of a product with packed weights, written in LLVM's language: a tile of results, some rows of
activations by one panel of weights, stays in registers while the columns pass. Weights are widened to fp32 there.

Each result is one chain of fused multiply-adds in the order of the columns, whatever the size of the tile.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

_ASKED_FOR: str | None = vars(config)["CPU_FEATURES"]
_FEATURES = (get_host_cpu_features() if _ASKED_FOR is None else _ASKED_FOR).split(",")
LANES = 16 if "+avx512f" in _FEATURES else 8 if "+avx2" in _FEATURES else 4
"""fp32 numbers of a vector register."""
TILE_ROWS = 4 if LANES == 8 else 8
"""By `PANEL_VECTORS`: what the registers hold. AVX2 has 16, the others 32."""
PANEL_VECTORS = 3
_UNROLLED = 4
_AHEAD_BYTES, _LINE_BYTES = 8192, 64
"""How far ahead weights are fetched: the core's own prefetcher stops at pages."""

_FP32, _INT32, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_BYTE_POINTER = ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(_FP32, LANES)
_FP32_BYTES, _VECTOR_BYTES = 4, 4 * LANES
ELEMENT_BYTES = {types.float32: 4, types.int16: 2, types.uint16: 2, types.int8: 1}
"""By the type of their array: int16 stands for fp16, uint16 for bfloat16."""


def tile(rows: int, vectors: int) -> Any:
    """tile(x_MK, x_at, weights, weights_at, count, scales_N, first, out_MN, out_at, add)

    The products of `count` columns of `rows` rows of activations, from element `x_at` on, and of a panel of `vectors`,
    from `weights_at` on, are written to `out_at` and below, or added where `add` is 1; times the scales from `first` on
    where weights are int8.
    """

    def tile(
        _context: Any, x: Any, x_at: Any, weights: Any, weights_at: Any, count: Any, scales: Any, first: Any,
        out: Any, out_at: Any, add: Any,
    ):  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, panel, scales, out = (
                _Operand(context, builder, signature.args[at], *arguments[at : at + 2]) for at in (0, 2, 5, 7)
            )
            loop = _Loop(builder, x.rows(rows), panel.start, arguments[4], vectors, signature.args[2].dtype)
            sums = loop.sums()
            if signature.args[2].dtype == types.int8:
                scale = [load(builder, pointer, _VECTOR) for pointer in scales.vectors(scales.start, vectors)]
                sums = [builder.fmul(total, scale[at % vectors]) for at, total in enumerate(sums)]
            pointers = [pointer for row in out.rows(rows) for pointer in out.vectors(row, vectors)]
            adding = builder.icmp_signed("!=", arguments[9], _constant(0))
            for pointer, total in zip(pointers, sums, strict=True):
                more = builder.fadd(load(builder, pointer, _VECTOR), total)
                store(builder, builder.select(adding, more, total), pointer)
            return context.get_dummy_value()

        return types.void(x, x_at, weights, weights_at, count, scales, first, out, out_at, add), emit

    return intrinsic(tile)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INDEX, value)


def load(builder: Any, pointer: Any, llvm_type: Any) -> Any:
    return builder.load(builder.bitcast(pointer, llvm_type.as_pointer()), align=1)


def store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


def offset(builder: Any, pointer: Any, num_bytes: int) -> Any:
    return builder.gep(pointer, [_constant(num_bytes)])


class _Operand:
    """An array, from element `at` of its memory on."""

    def __init__(self, context: Any, builder: Any, array_type: Any, value: Any, at: Any) -> None:
        array = context.make_array(array_type)(context, builder, value)
        self._builder, self._array = builder, array
        self.start = builder.bitcast(builder.gep(array.data, [at]), _BYTE_POINTER)

    def rows(self, count: int) -> list[Any]:
        """Where the row begins that `start` is in, and those below it: as far into each as `start` is."""
        columns = cgutils.unpack_tuple(self._builder, self._array.shape)[1]
        row_bytes = self._builder.mul(columns, _constant(_FP32_BYTES))
        distances = (self._builder.mul(row_bytes, _constant(row)) for row in range(count))
        return [self._builder.gep(self.start, [distance]) for distance in distances]

    def vectors(self, pointer: Any, count: int) -> list[Any]:
        return [offset(self._builder, pointer, number * _VECTOR_BYTES) for number in range(count)]


class _Loop:
    """Over `columns` columns of the activations that `rows` point to, and of the panel at `weights`."""

    def __init__(
        self, builder: Any, rows: list[Any], weights: Any, columns: Any, vectors: int, weight_type: Any
    ) -> None:
        self._builder, self._rows, self._weights, self._columns = builder, rows, weights, columns
        self._vectors, self._weight_type = vectors, weight_type
        self._vector_bytes = LANES * ELEMENT_BYTES[weight_type]
        self._column_bytes = vectors * self._vector_bytes
        declare = cgutils.get_or_insert_function
        multiply_add, hint = f"llvm.fma.v{LANES}f32", [_BYTE_POINTER, *[_INT32] * 3]
        self._multiply_add = declare(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), multiply_add)
        self._prefetch = declare(builder.module, ir.FunctionType(ir.VoidType(), hint), "llvm.prefetch.p0")

    def sums(self) -> list[Any]:
        """Vectors of results, row by row."""
        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        column, sums = self._over(_UNROLLED, _constant(0), [zero] * (len(self._rows) * self._vectors))
        return self._over(1, column, sums)[1]

    def _over(self, step: int, first: Any, sums: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Takes `step` columns at once while so many are left; returns the next column and the sums."""
        builder, before = self._builder, self._builder.block
        head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        column, grown = builder.phi(_INDEX), [builder.phi(_VECTOR) for _ in sums]
        following = builder.add(column, _constant(step))
        builder.cbranch(builder.icmp_signed("<=", following, self._columns), body, done)
        builder.position_at_end(body)
        added = self._with_columns(column, step, grown)
        builder.branch(head)
        for phi, start, end in zip((column, *grown), (first, *sums), (following, *added), strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(end, body)
        builder.position_at_end(done)
        return column, grown

    def _with_columns(self, column: Any, count: int, sums: Sequence[Any]) -> Sequence[Any]:
        builder = self._builder
        weights = builder.gep(self._weights, [builder.mul(column, _constant(self._column_bytes))])
        x_bytes = builder.mul(column, _constant(_FP32_BYTES))
        for ahead in range(0, self._column_bytes * count, _LINE_BYTES):
            read, everywhere, data = (ir.Constant(_INT32, value) for value in (0, 3, 1))
            builder.call(
                self._prefetch, [offset(builder, weights, _AHEAD_BYTES + ahead), read, everywhere, data]
            )
        for number in range(count):
            x_at = builder.add(x_bytes, _constant(number * _FP32_BYTES))
            starts = (builder.gep(row, [x_at]) for row in self._rows)
            values = [repeated(builder, load(builder, start, _FP32), LANES) for start in starts]
            sums = self._with_column(offset(builder, weights, number * self._column_bytes), values, sums)
        return sums

    def _with_column(self, weights: Any, values: Sequence[Any], sums: Sequence[Any]) -> list[Any]:
        starts = [offset(self._builder, weights, at * self._vector_bytes) for at in range(self._vectors)]
        panel = [widened(self._builder, start, self._weight_type, LANES) for start in starts]
        factors = ((value, vector) for value in values for vector in panel)
        return [
            self._builder.call(self._multiply_add, [*pair, total])
            for pair, total in zip(factors, sums, strict=True)
        ]


def repeated(builder: Any, value: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(_FP32, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes))


def widened(builder: Any, pointer: Any, element: Any, lanes: int) -> Any:
    """So many elements in fp32."""
    vector, integers = ir.VectorType(_FP32, lanes), ir.VectorType(_INT32, lanes)
    if element == types.float32:
        return load(builder, pointer, vector)
    if element == types.int16:
        return builder.fpext(load(builder, pointer, ir.VectorType(ir.HalfType(), lanes)), vector)
    if element == types.int8:
        wide = builder.sext(load(builder, pointer, ir.VectorType(ir.IntType(8), lanes)), integers)
        return builder.sitofp(wide, vector)
    bits = builder.zext(load(builder, pointer, ir.VectorType(ir.IntType(16), lanes)), integers)
    return builder.bitcast(builder.shl(bits, ir.Constant(integers, [16] * lanes)), vector)
