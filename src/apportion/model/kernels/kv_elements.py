"""Elements of a KV pool, or of a table, in compiled code: int16 stands for fp16, uint16 for bf16, as numba knows no
16-bit floats."""

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ELEMENT_TYPES = {torch.float32: torch.float32, torch.float16: torch.int16, torch.bfloat16: torch.uint16}
"""How compiled code sees a pool of the dtype."""
_WORD, _SHORT, _FLOAT, _HALF = ir.IntType(32), ir.IntType(16), ir.FloatType(), ir.HalfType()
_FP16_EXPONENT = 0x7C00
"""All its bits are set in what is infinite or not a number."""
_QUIET_NAN = 0x7FC0


def _emit_widened(_context: Any, element: Any) -> Any:
    """In fp32, exactly."""

    def emit(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if signature.args[0] == types.float32:
            return value
        if signature.args[0] == types.int16:
            return builder.fpext(builder.bitcast(value, _HALF), _FLOAT)
        if signature.args[0] == types.int8:
            return builder.sitofp(value, _FLOAT)
        return builder.bitcast(builder.shl(builder.zext(value, _WORD), ir.Constant(_WORD, 16)), _FLOAT)

    return types.float32(element), emit


def _emit_narrowed(_context: Any, value: Any, like: Any) -> Any:
    """As an element of the array `like`, to the nearest, of two to the even one: torch's own cast."""

    def emit(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, element = arguments[0], signature.args[1].dtype
        if element == types.float32:
            return wide
        if element == types.int16:
            return builder.bitcast(builder.fptrunc(wide, _HALF), _SHORT)
        bits = builder.bitcast(wide, _WORD)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_WORD, 16)), ir.Constant(_WORD, 1))
        up = builder.add(builder.add(bits, ir.Constant(_WORD, 0x7FFF)), odd)
        rounded = builder.trunc(builder.lshr(up, ir.Constant(_WORD, 16)), _SHORT)
        return builder.select(
            builder.fcmp_unordered("uno", wide, wide), ir.Constant(_SHORT, _QUIET_NAN), rounded
        )

    return like.dtype(value, like), emit


def _emit_beyond(_context: Any, element: Any) -> Any:
    """1 where an fp16 element is no finite number, else 0; other formats have fp32's range."""

    def emit(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] != types.int16:
            return ir.Constant(_WORD, 0)
        exponent = ir.Constant(_SHORT, _FP16_EXPONENT)
        found = builder.icmp_unsigned("==", builder.and_(arguments[0], exponent), exponent)
        return builder.zext(found, _WORD)

    return types.int32(element), emit


widened: Callable[..., Any] = intrinsic(_emit_widened)
narrowed: Callable[..., Any] = intrinsic(_emit_narrowed)
beyond_range: Callable[..., Any] = intrinsic(_emit_beyond)
