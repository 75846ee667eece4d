"""2^x for compiled code in fp32: a polynomial, because it vectorises."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from apportion.model.kernels.op_code import FAST

LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23
_HIGHEST_EXPONENT = np.float32(126)
_F = np.float32


def _emit_power_of_2(_context: Any, exponent: Any) -> Any:
    """2^exponent, of an integer in float, by its bits; in plain Python the integers would be of 64 bits."""

    def emit(_context, builder, _signature, arguments):
        word = ir.IntType(32)
        biased = builder.add(builder.fptosi(arguments[0], word), ir.Constant(word, _EXPONENT_BIAS))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, _MANTISSA_BITS)), ir.FloatType())

    return types.float32(exponent), emit


_power_of_2: Callable[..., np.float32] = intrinsic(_emit_power_of_2)


@njit(fastmath=FAST, inline="always")
def exp2(x):
    """2^k · e^r with |r| ≤ ln 2 / 2, relative error below 2e-7; x is cut off at ± `_HIGHEST_EXPONENT`."""
    x = min(max(x, -_HIGHEST_EXPONENT), _HIGHEST_EXPONENT)
    k = np.floor(x + _F(0.5))
    r = (x - k) * _LN_2
    tail = _F(1 / 6) + r * (_F(1 / 24) + r * (_F(1 / 120) + r * _F(1 / 720)))
    power = _F(1) + r * (_F(1) + r * (_F(0.5) + r * tail))
    return power * _power_of_2(k)
