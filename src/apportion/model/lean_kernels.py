"""What a lean layer does between its products, in fp32 on a CPU: each function one compiled pass over the rows.

What a row gets depends on it alone. numba compiles them when this module is first imported on a machine, and keeps
the result on disk.

Shapes: T = tokens of the batch, H = hidden size, N = query heads, K = KV heads, W = N + 2·K, D = head dim, F = FFN
columns; X is D with a norm, else 0.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be reordered; infinities keep their meaning."""
_F = np.float32
_LOG2_E, _LN_2 = _F(1.4426950408889634), _F(0.6931471805599453)
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23
_HIGHEST_EXPONENT = _F(126)


@njit(fastmath=_FAST, inline="always")
def _scale(x_H, eps):
    """1 / root mean square"""
    squares = _F(0)
    for h in range(len(x_H)):
        squares += x_H[h] * x_H[h]
    return _F(1) / np.sqrt(squares / _F(len(x_H)) + eps)


@njit(fastmath=_FAST, inline="always")
def _norm_row(x_H, weight_H, eps, out_H):
    scale = _scale(x_H, eps)
    for h in range(len(x_H)):
        out_H[h] = x_H[h] * scale * weight_H[h]


def _norm(x_TH, weight_H, eps, out_TH):
    """RMS norm; `out_TH` may be `x_TH`."""
    for t in range(len(x_TH)):
        _norm_row(x_TH[t], weight_H, eps, out_TH[t])


def _add_norm(x_TH, sum_TH, weight_H, eps, out_TH):
    """Adds x to `sum_TH`; `out_TH` is the sum's RMS norm."""
    for t in range(len(x_TH)):
        for h in range(x_TH.shape[1]):
            sum_TH[t, h] += x_TH[t, h]
        _norm_row(sum_TH[t], weight_H, eps, out_TH[t])


@njit(fastmath=_FAST, inline="always")
def _turn(x_D, cos_D, sin_D, out_D):
    half = len(x_D) // 2
    low, high, out_low, out_high = x_D[:half], x_D[half:], out_D[:half], out_D[half:]
    for d in range(half):
        out_low[d] = low[d] * cos_D[d] - high[d] * sin_D[d]
        out_high[d] = high[d] * cos_D[d] + low[d] * sin_D[d]


def _split(projected_TWD, cos_TD, sin_TD, query_weight_X, key_weight_X, eps, query_TND, key_TKD, value_TKD):
    """Query, key and value apart, the first two normed and rotated. `projected_TWD` is scratch afterwards.

    The second halves of cos and sin repeat the first."""
    heads, kv_heads = query_TND.shape[1], key_TKD.shape[1]
    for t in range(len(projected_TWD)):
        cos_D, sin_D = cos_TD[t], sin_TD[t]
        if len(query_weight_X):
            for n in range(heads):
                _norm_row(projected_TWD[t, n], query_weight_X, eps, projected_TWD[t, n])
            for n in range(heads, heads + kv_heads):
                _norm_row(projected_TWD[t, n], key_weight_X, eps, projected_TWD[t, n])
        for n in range(heads):
            _turn(projected_TWD[t, n], cos_D, sin_D, query_TND[t, n])
        for k in range(kv_heads):
            _turn(projected_TWD[t, heads + k], cos_D, sin_D, key_TKD[t, k])
            for d in range(value_TKD.shape[2]):
                value_TKD[t, k, d] = projected_TWD[t, heads + kv_heads + k, d]


def _emit_power_of_2(_context: Any, exponent: Any) -> Any:
    """2^exponent, of an integer in float, by its bits; in plain Python the integers would be of 64 bits."""

    def emit(_context, builder, _signature, arguments):
        word = ir.IntType(32)
        biased = builder.add(builder.fptosi(arguments[0], word), ir.Constant(word, _EXPONENT_BIAS))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, _MANTISSA_BITS)), ir.FloatType())

    return types.float32(exponent), emit


_power_of_2: Callable[..., np.float32] = intrinsic(_emit_power_of_2)


@njit(fastmath=_FAST, inline="always")
def _exp2(x):
    """A polynomial, because it vectorises: 2^k · e^r with |r| ≤ ln 2 / 2, relative error below 2e-7; x is cut off at
    ± `_HIGHEST_EXPONENT`."""
    x = min(max(x, -_HIGHEST_EXPONENT), _HIGHEST_EXPONENT)
    k = np.floor(x + _F(0.5))
    r = (x - k) * _LN_2
    tail = _F(1 / 6) + r * (_F(1 / 24) + r * (_F(1 / 120) + r * _F(1 / 720)))
    power = _F(1) + r * (_F(1) + r * (_F(0.5) + r * tail))
    return power * _power_of_2(k)


def _gate(gate_up_TG, linear, cubic, out_TF):
    """gate · up / (1 + exp(−(linear · gate + cubic · gate³))), of which the gates are the first half of each row."""
    columns = out_TF.shape[1]
    for t in range(len(out_TF)):
        gate_F, up_F, out_F = gate_up_TG[t, :columns], gate_up_TG[t, columns:], out_TF[t]
        for f in range(columns):
            x = gate_F[f]
            out_F[f] = x * up_F[f] / (_F(1) + _exp2(-_LOG2_E * x * (linear + cubic * x * x)))


_FLOAT = types.float32
_ROW, _ROWS, _HEADS = _FLOAT[::1], _FLOAT[:, ::1], _FLOAT[:, :, ::1]


def _compiled(signature: Any, function: Callable[..., None]) -> Callable[..., None]:
    # With Python's division, which raises, no loop that divides is vectorised.
    return njit(signature, fastmath=_FAST, error_model="numpy", nogil=True, cache=True)(function)


norm = _compiled(types.void(_ROWS, _ROW, _FLOAT, _ROWS), _norm)
add_norm = _compiled(types.void(_ROWS, _ROWS, _ROW, _FLOAT, _ROWS), _add_norm)
split = _compiled(types.void(_HEADS, _ROWS, _ROWS, _ROW, _ROW, _FLOAT, _HEADS, _HEADS, _HEADS), _split)
gate = _compiled(types.void(_ROWS, _FLOAT, _FLOAT, _ROWS), _gate)
