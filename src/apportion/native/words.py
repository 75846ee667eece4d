"""What compiled code does with bare addresses: arrays and shared 64-bit words at them, functions called by them.

Each is for use in functions that numba compiles.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WORD = ir.IntType(64)
_WORD_BYTES = 8
_BYTE_POINTER = ir.IntType(8).as_pointer()


def _emit_pointer(_context: Any, address: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _BYTE_POINTER)

    return types.voidptr(address), emit


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, WORD.as_pointer())


def _emit_load(_context: Any, address: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_at(builder, arguments[0]), "acquire", _WORD_BYTES)

    return types.int64(address), emit


def _emit_store(_context: Any, address: Any, _value: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _at(builder, arguments[0]), "seq_cst", _WORD_BYTES)
        return context.get_dummy_value()

    return types.void(address, types.int64), emit


def _emit_count(_context: Any, address: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _at(builder, arguments[0]), ir.Constant(WORD, 1), "acq_rel")

    return types.int64(address), emit


def _emit_call(_context: Any, address: Any, words: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        values = cgutils.unpack_tuple(builder, arguments[1])
        function = ir.FunctionType(ir.VoidType(), [WORD] * len(values)).as_pointer()
        builder.call(builder.inttoptr(arguments[0], function), values)
        return context.get_dummy_value()

    return types.void(address, words), emit


pointer: Callable[..., Any] = intrinsic(_emit_pointer)
"""What lies at an address, for numba's `carray`."""
load_word: Callable[..., int] = intrinsic(_emit_load)
"""A word that another thread or process may change at any time, before all that is read after."""
store_word: Callable[..., None] = intrinsic(_emit_store)
"""After all that was written before, and before all that is read after."""
count_word: Callable[..., int] = intrinsic(_emit_count)
"""Adds 1 to the word; returns what it was."""
call: Callable[..., None] = intrinsic(_emit_call)
"""The function at an address, of so many words."""
