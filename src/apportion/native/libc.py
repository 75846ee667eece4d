"""The C library's clocks, sleeps and waits, for use in functions that numba compiles. Times are nanoseconds."""

import select
import time
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from apportion.native.words import WORD

_INT, _SHORT = ir.IntType(32), ir.IntType(16)
_TIMESPEC = ir.LiteralStructType([WORD, WORD])
_POLLED = ir.LiteralStructType([_INT, _SHORT, _SHORT])
_SECOND_NS = 10**9
_CLOCK = time.CLOCK_MONOTONIC
_THREAD_CLOCK = time.CLOCK_THREAD_CPUTIME_ID
_FUTEX_WAIT, _FUTEX_WAKE, _ALL_SLEEPERS = 0, 1, 2**31 - 1
_SYS_FUTEX = 202
"""On x86-64, where memory is shared (`parallel.shared`)."""
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def _timespec(builder: Any, nanoseconds: Any) -> Any:
    second = ir.Constant(WORD, _SECOND_NS)
    parts = builder.sdiv(nanoseconds, second), builder.srem(nanoseconds, second)
    place = cgutils.alloca_once(builder, _TIMESPEC)
    for number, part in enumerate(parts):
        builder.store(part, cgutils.gep_inbounds(builder, place, 0, number))
    return place


def _emit_clock(_context: Any, _clock: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = cgutils.alloca_once(builder, _TIMESPEC)
        _call(builder, "clock_gettime", _INT, builder.trunc(arguments[0], _INT), place)
        seconds, rest = (builder.load(cgutils.gep_inbounds(builder, place, 0, at)) for at in range(2))
        return builder.add(builder.mul(seconds, ir.Constant(WORD, _SECOND_NS)), rest)

    return types.int64(types.int64), emit


def _emit_sleep(_context: Any, _nanoseconds: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = _timespec(builder, arguments[0])
        _call(builder, "nanosleep", _INT, place, ir.Constant(place.type, None))
        return context.get_dummy_value()

    return types.void(types.int64), emit


def _emit_give_way(_context: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        _call(builder, "sched_yield", _INT)
        return context.get_dummy_value()

    return types.void(), emit


def _emit_futex(_context: Any, _address: Any, _operation: Any, _value: Any, _nanoseconds: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, operation, value, nanoseconds = arguments
        number, none = ir.Constant(WORD, _SYS_FUTEX), ir.Constant(WORD, 0)
        place = builder.ptrtoint(_timespec(builder, nanoseconds), WORD)
        _call(builder, "syscall", WORD, number, address, operation, value, place, none, none)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), emit


def _emit_hung_up(_context: Any, _descriptor: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = cgutils.alloca_once(builder, _POLLED)
        fields = [cgutils.gep_inbounds(builder, place, 0, at) for at in range(3)]
        builder.store(builder.trunc(arguments[0], _INT), fields[0])
        for field in fields[1:]:
            builder.store(ir.Constant(_SHORT, 0), field)
        _call(builder, "poll", _INT, place, ir.Constant(WORD, 1), ir.Constant(_INT, 0))
        seen = builder.and_(builder.load(fields[2]), ir.Constant(_SHORT, _GONE))
        return builder.icmp_unsigned("!=", seen, ir.Constant(_SHORT, 0))

    return types.boolean(types.int64), emit


_clock: Callable[..., int] = intrinsic(_emit_clock)
_futex: Callable[..., None] = intrinsic(_emit_futex)
sleep_ns: Callable[..., None] = intrinsic(_emit_sleep)
"""A signal may end it early."""
give_way: Callable[..., None] = intrinsic(_emit_give_way)
"""Offers the core to another thread."""
is_hung_up: Callable[..., bool] = intrinsic(_emit_hung_up)
"""Whether the other side of the socket of this descriptor is closed."""


@njit(inline="always")
def now_ns():
    """As `time.perf_counter_ns` on Linux."""
    return _clock(_CLOCK)


@njit(inline="always")
def thread_ns():
    """CPU time of the calling thread."""
    return _clock(_THREAD_CLOCK)


@njit(inline="always")
def sleep_while(address, value, nanoseconds):
    """Until another process calls `wake_all`, unless the word's lower half is no longer `value`; or so long at most."""
    _futex(address, _FUTEX_WAIT, value, nanoseconds)


@njit(inline="always")
def wake_all(address):
    _futex(address, _FUTEX_WAKE, _ALL_SLEEPERS, 0)
