"""The inner loops of attention over a KV pool, written in LLVM's language: tiles of scores and of outputs stay in
registers while elements or keys pass. Keys and values are widened to fp32 there.

Rows are query heads that see the same keys. Strides and positions count elements of an array's memory. Vectors have 16
lanes on every machine, so that a score is the same sum on all.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from apportion.model.kernels.lanes import NUM_LANES
from apportion.model.kernels.tile_code import ELEMENT_BYTES, LANES, load, offset, repeated, store, widened

TILE_KEYS, TILE_ROWS, TILE_VECTORS = (4, 4, 4) if LANES == NUM_LANES else (2, 2, 1)
"""By each other: what the registers hold. AVX-512 has 32, the others need several for a vector."""

_SUMMED_TOGETHER = 4
_UNROLLED = 4

_FP32, _INT32, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_BYTE_POINTER = ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(_FP32, NUM_LANES)


def score_tile(rows: int, keys: int) -> Any:
    """score_tile(query, query_at, keys, keys_at, head_dim, vectors, scores, scores_at, scores_stride)

    Writes the products of `rows` queries and `keys` keys, all of stride `head_dim`, of which the first `vectors`
    vectors count; a row's scores lie side by side.
    """

    def tile(
        _context: Any, query: Any, query_at: Any, stored: Any, stored_at: Any, head_dim: Any, vectors: Any,
        scores: Any, scores_at: Any, stride: Any,
    ):  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            code = _Code(context, builder)
            queries = code.rows(signature, arguments, 0, arguments[4], rows)
            stored_rows = code.rows(signature, arguments, 2, arguments[4], keys)
            element = signature.args[2].dtype

            def add(number: Any, sums: Sequence[Any]) -> Sequence[Any]:
                at = builder.mul(number, code.index(NUM_LANES))
                query = [code.vector(code.shifted(row, at, types.float32), types.float32) for row in queries]
                key = (code.vector(code.shifted(row, at, element), element) for row in stored_rows)
                pairs = ((q, k) for k in key for q in query)
                return [code.multiply_add(*pair, total) for pair, total in zip(pairs, sums, strict=True)]

            sums = code.loop(arguments[5], [code.zero] * (rows * keys), add)
            outputs = code.rows(signature, arguments, 6, arguments[8], rows)
            for row, pointer in enumerate(outputs):
                store(builder, code.summed(sums[row::rows]), pointer)
            return context.get_dummy_value()

        arguments = (query, query_at, stored, stored_at, head_dim, vectors, scores, scores_at, stride)
        return types.void(*arguments), emit

    return intrinsic(tile)


def value_tile(rows: int, vectors: int) -> Any:
    """value_tile(weights, weights_at, weights_stride, values, values_at, head_dim, count, out, out_at)

    Adds the sum of `count` values, each times its weight, to `vectors` vectors of `rows` rows of `out`, whose weights
    lie side by side. The values and the rows of `out` have stride `head_dim`.
    """

    def tile(
        _context: Any, weights: Any, weights_at: Any, stride: Any, values: Any, values_at: Any, head_dim: Any,
        count: Any, out: Any, out_at: Any,
    ):  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            code = _Code(context, builder)
            weight_rows = code.rows(signature, arguments, 0, arguments[2], rows)
            (value_row,) = code.rows(signature, arguments, 3, arguments[5], 1)
            element = signature.args[3].dtype

            def add(number: Any, sums: Sequence[Any]) -> list[Any]:
                starts = (code.shifted(row, number, types.float32) for row in weight_rows)
                weights = [repeated(builder, load(builder, start, _FP32), NUM_LANES) for start in starts]
                start = code.shifted(value_row, builder.mul(number, arguments[5]), element)
                step = NUM_LANES * ELEMENT_BYTES[element]
                value = [code.vector(offset(builder, start, step * i), element) for i in range(vectors)]
                pairs = [(w, v) for w in weights for v in value]
                return [code.multiply_add(*pair, total) for pair, total in zip(pairs, sums, strict=True)]

            pointers = [
                offset(builder, row, 4 * NUM_LANES * i)
                for row in code.rows(signature, arguments, 7, arguments[5], rows)
                for i in range(vectors)
            ]
            before = [code.vector(pointer, types.float32) for pointer in pointers]
            for total, pointer in zip(code.loop(arguments[6], before, add), pointers, strict=True):
                store(builder, total, pointer)
            return context.get_dummy_value()

        arguments = (weights, weights_at, stride, values, values_at, head_dim, count, out, out_at)
        return types.void(*arguments), emit

    return intrinsic(tile)


def _prefetch(_context: Any, array: Any, at: Any):
    """The cache line of element `at`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        hint = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER, *[_INT32] * 3])
        function = cgutils.get_or_insert_function(builder.module, hint, "llvm.prefetch.p0")
        (pointer,) = _Code(context, builder).rows(signature, arguments, 0, arguments[1], 1)
        builder.call(function, [pointer, *(ir.Constant(_INT32, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, at), emit


prefetch: Callable[..., None] = intrinsic(_prefetch)


class _Code:
    def __init__(self, context: Any, builder: Any) -> None:
        self._context, self._builder = context, builder
        self.zero = ir.Constant(_VECTOR, [0.0] * NUM_LANES)
        self._multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{NUM_LANES}f32"
        )

    @staticmethod
    def index(value: int) -> ir.Constant:
        return ir.Constant(_INDEX, value)

    def rows(self, signature: Any, arguments: Any, number: int, stride: Any, count: int) -> list[Any]:
        """Where `count` rows begin, of the array that is argument `number`, from the position that follows it on."""
        array_type = signature.args[number]
        array = self._context.make_array(array_type)(self._context, self._builder, arguments[number])
        start = self._builder.bitcast(array.data, _BYTE_POINTER)
        start = self.shifted(start, arguments[number + 1], array_type.dtype)
        distances = (self._builder.mul(stride, self.index(row)) for row in range(count))
        return [self.shifted(start, distance, array_type.dtype) for distance in distances]

    def shifted(self, pointer: Any, elements: Any, element: Any) -> Any:
        return self._builder.gep(pointer, [self._builder.mul(elements, self.index(ELEMENT_BYTES[element]))])

    def vector(self, pointer: Any, element: Any) -> Any:
        return widened(self._builder, pointer, element, NUM_LANES)

    def multiply_add(self, one: Any, other: Any, total: Any) -> Any:
        return self._builder.call(self._multiply_add, [one, other, total])

    def _shuffled(self, one: Any, other: Any, lanes: Sequence[int]) -> Any:
        mask = ir.Constant(ir.VectorType(_INT32, len(lanes)), list(lanes))
        return self._builder.shuffle_vector(one, other, mask)

    def loop(self, count: Any, start: Sequence[Any], body: Any) -> Sequence[Any]:
        """`body` of 0, 1, … count − 1 and of what it gave before."""
        number, held = self._loop(_UNROLLED, self.index(0), count, start, body)
        return self._loop(1, number, count, held, body)[1]

    def _loop(
        self, step: int, first: Any, count: Any, start: Sequence[Any], body: Any
    ) -> tuple[Any, Sequence[Any]]:
        """Takes `step` numbers at once while so many are left; returns the next one."""
        builder, before = self._builder, self._builder.block
        head, inside, done = (builder.append_basic_block(name) for name in ("head", "inside", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        number, held = builder.phi(_INDEX), [builder.phi(_VECTOR) for _ in start]
        following = builder.add(number, self.index(step))
        builder.cbranch(builder.icmp_signed("<=", following, count), inside, done)
        builder.position_at_end(inside)
        after: Sequence[Any] = held
        for ahead in range(step):
            after = body(builder.add(number, self.index(ahead)), after)
        builder.branch(head)
        for phi, initial, next_one in zip((number, *held), (first, *start), (following, *after), strict=True):
            phi.add_incoming(initial, before)
            phi.add_incoming(next_one, inside)
        builder.position_at_end(done)
        return number, held

    def summed(self, vectors: Sequence[Any]) -> Any:
        """The sums of some vectors side by side; each in the same order, however many there are."""
        count = len(vectors)
        a, b, c, d = [*vectors] * (_SUMMED_TOGETHER // count)
        sums = self._halved(self._paired(self._paired(a, b, 1), self._paired(c, d, 1), 2))
        return sums if count == _SUMMED_TOGETHER else self._shuffled(sums, sums, range(count))

    def _paired(self, one: Any, other: Any, width: int) -> Any:
        """Of every four lanes the first and second half are added: those of `one` and, behind, of `other`, in units of
        `width` lanes that take turns."""
        low = [
            lane + NUM_LANES * source + within
            for lane in range(0, NUM_LANES, 4)
            for unit in range(2 // width)
            for source in (0, 1)
            for within in range(unit * width, (unit + 1) * width)
        ]
        high = [lane + 2 for lane in low]
        return self._builder.fadd(self._shuffled(one, other, low), self._shuffled(one, other, high))

    def _halved(self, vector: Any) -> Any:
        """Halves added until a lane is left of each sum."""
        width = NUM_LANES
        while width > _SUMMED_TOGETHER:
            width //= 2
            low, high = list(range(width)), list(range(width, 2 * width))
            vector = self._builder.fadd(
                self._shuffled(vector, vector, low), self._shuffled(vector, vector, high)
            )
        return vector
