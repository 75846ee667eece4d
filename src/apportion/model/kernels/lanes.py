"""fp32 arithmetic of compiled code whose every rounding is written down, so that all machines and all compilations
give the same bits: sums over 16 lanes in one order, whether a register has 16, 8 or 4; a product is fused with a sum
where it says `fma`, and nowhere else.

Kernels are compiled without fast math. A loop whose results do not depend on each other may be left to the compiler's
vectors; what adds up or looks for the highest is written with lanes.

Operands are fp32 numbers, fp64 numbers or 16 lanes; a number beside lanes stands for 16 of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

NUM_LANES = 16
_INT32, _BYTE_POINTER = ir.IntType(32), ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(ir.FloatType(), NUM_LANES)
_FP32_BYTES = 4
_WORDS = {ir.FloatType(): 32, ir.DoubleType(): 64}
_Emitted = tuple[Any, Callable[..., Any]]


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, data_models: Any, lanes_type: Any) -> None:
        super().__init__(data_models, lanes_type, _VECTOR)


_LANES = _Lanes()


def _common(operands: Sequence[Any]) -> Any:
    """The type of what operands of these types give."""
    return _LANES if _LANES in operands else types.float64 if types.float64 in operands else types.float32


def _values(context: Any, builder: Any, signature: Any, arguments: Any) -> list[Any]:
    """All of the common type."""
    common = _common(signature.args)
    values = []
    for value, own in zip(arguments, signature.args, strict=True):
        if common == _LANES and own != _LANES:
            number = context.cast(builder, value, own, types.float32)
            values.append(_repeated(builder, number))
        else:
            values.append(context.cast(builder, value, own, common) if own != common else value)
    return values


def _repeated(builder: Any, number: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(_INT32, 0))
    return _shuffled(builder, first, [0] * NUM_LANES)


def _shuffled(builder: Any, vector: Any, lanes: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_INT32, len(lanes)), list(lanes))
    return builder.shuffle_vector(vector, vector, mask)


def _name(llvm_type: Any) -> str:
    """As LLVM's own functions are called for this type."""
    if isinstance(llvm_type, ir.VectorType):
        return f"v{llvm_type.count}f32"
    return f"f{_WORDS[llvm_type]}"


def call(builder: Any, name: str, *values: Any) -> Any:
    """LLVM's function `name` of values of one type."""
    own = values[0].type
    function = ir.FunctionType(own, [own] * len(values))
    return builder.call(
        cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.{_name(own)}"), values
    )


def _emit_fma(_context: Any, one: Any, other: Any, more: Any) -> _Emitted:
    """one · other + more, rounded once"""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "fma", *_values(context, builder, signature, arguments))

    return _common((one, other, more))(one, other, more), emit


def _emit_rint(_context: Any, value: Any) -> _Emitted:
    """To the nearest integer, of two to the even one."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return call(builder, "rint", *arguments)

    return _common((value,))(value), emit


def _emit_power_of_2(_context: Any, exponent: Any) -> _Emitted:
    """2^exponent of an integer in fp32, by its bits."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        word = ir.VectorType(_INT32, NUM_LANES) if isinstance(value.type, ir.VectorType) else _INT32
        biased = builder.add(builder.fptosi(value, word), _constant(word, 127))
        return builder.bitcast(builder.shl(biased, _constant(word, 23)), value.type)

    return exponent(exponent), emit


def _constant(llvm_type: Any, number: float) -> Any:
    many = isinstance(llvm_type, ir.VectorType)
    return ir.Constant(llvm_type, [number] * llvm_type.count if many else number)


def _of_two(operate: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """`operate(builder, one, other)` as a compiled function."""

    def function(_context: Any, one: Any, other: Any) -> _Emitted:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return operate(builder, *_values(context, builder, signature, arguments))

        return _common((one, other))(one, other), emit

    return intrinsic(function)


def _higher(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def _lower(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", one, other), one, other)


def _emit_where_above(_context: Any, value: Any, bound: Any, then: Any) -> _Emitted:
    """`then` where the value is above the bound, else 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, bound, then = _values(context, builder, signature, arguments)
        return builder.select(builder.fcmp_ordered(">", value, bound), then, _constant(value.type, 0.0))

    return _common((value, bound, then))(value, bound, then), emit


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), _VECTOR.as_pointer())


def _emit_load(_context: Any, x: Any, at: Any) -> _Emitted:
    """Elements `[at, at + 16)` of the memory of an fp32 array."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_pointer(context, builder, signature.args[0], *arguments), align=_FP32_BYTES)

    return _LANES(x, at), emit


def _emit_load_upto(_context: Any, x: Any, _at: Any, _stop: Any) -> _Emitted:
    """As `load`; 0 for those from `stop` on, which are not read."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at, stop = arguments
        index = ir.VectorType(at.type, NUM_LANES)
        left = _shuffled(
            builder,
            builder.insert_element(
                ir.Constant(index, ir.Undefined), builder.sub(stop, at), ir.Constant(_INT32, 0)
            ),
            [0] * NUM_LANES,
        )
        seen = builder.icmp_signed("<", ir.Constant(index, list(range(NUM_LANES))), left)
        pointer = _pointer(context, builder, signature.args[0], array, at)
        function = ir.FunctionType(_VECTOR, [pointer.type, _INT32, seen.type, _VECTOR])
        name = f"llvm.masked.load.{_name(_VECTOR)}.p0"
        masked = cgutils.get_or_insert_function(builder.module, function, name)
        align = ir.Constant(_INT32, _FP32_BYTES)
        return builder.call(masked, [pointer, align, seen, _constant(_VECTOR, 0.0)])

    return _LANES(x, types.intp, types.intp), emit


def _emit_store(_context: Any, lanes: Any, x: Any, at: Any) -> _Emitted:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[1], *arguments[1:])
        builder.store(arguments[0], pointer, align=_FP32_BYTES)
        return context.get_dummy_value()

    return types.void(lanes, x, at), emit


def _emit_zeros(_context: Any) -> _Emitted:
    return _LANES(), lambda *_: _constant(_VECTOR, 0.0)


def _emit_all_lanes(_context: Any, number: Any) -> _Emitted:
    return _LANES(number), lambda _context, builder, _signature, arguments: _repeated(builder, *arguments)


def _folded(operate: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """One number of 16 lanes, which `operate` makes 8, 4, 2 and 1: lane i and lane i + half."""

    def function(_context: Any, lanes: Any) -> _Emitted:
        def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            vector, width = arguments[0], NUM_LANES
            while width > 1:
                width //= 2
                halves = (_shuffled(builder, vector, range(start, start + width)) for start in (0, width))
                vector = operate(builder, *halves)
            return builder.extract_element(vector, ir.Constant(_INT32, 0))

        return types.float32(lanes), emit

    return intrinsic(function)


fma: Callable[..., Any] = intrinsic(_emit_fma)
rint: Callable[..., Any] = intrinsic(_emit_rint)
power_of_2: Callable[..., Any] = intrinsic(_emit_power_of_2)
plus = _of_two(lambda builder, one, other: builder.fadd(one, other))
minus = _of_two(lambda builder, one, other: builder.fsub(one, other))
times = _of_two(lambda builder, one, other: builder.fmul(one, other))
over = _of_two(lambda builder, one, other: builder.fdiv(one, other))
higher, lower = _of_two(_higher), _of_two(_lower)
where_above: Callable[..., Any] = intrinsic(_emit_where_above)
load: Callable[..., Any] = intrinsic(_emit_load)
load_upto: Callable[..., Any] = intrinsic(_emit_load_upto)
store: Callable[..., None] = intrinsic(_emit_store)
zeros: Callable[..., Any] = intrinsic(_emit_zeros)
all_lanes: Callable[..., Any] = intrinsic(_emit_all_lanes)
sum_of = _folded(lambda builder, one, other: builder.fadd(one, other))
highest_of = _folded(_higher)


@njit(inline="always")
def sum_of_squares(x_H):
    """Four chains of 16 lanes take turns; what is left of a whole turn is the first one's."""
    count, h = len(x_H), 0
    a = b = c = d = zeros()
    while h + 4 * NUM_LANES <= count:
        e, f, g, i = load(x_H, h), load(x_H, h + 16), load(x_H, h + 32), load(x_H, h + 48)
        a, b, c, d = fma(e, e, a), fma(f, f, b), fma(g, g, c), fma(i, i, d)
        h += 4 * NUM_LANES
    while h < count:
        e = load_upto(x_H, h, count)
        a = fma(e, e, a)
        h += NUM_LANES
    return sum_of(plus(plus(a, c), plus(b, d)))
