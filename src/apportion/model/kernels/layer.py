"""What a lean layer does between its products, in fp32 on a CPU: each op one pass over the rows.

What a row gets depends on it alone. numba compiles them when this module is first imported on a machine, and keeps
the result on disk.

Shapes: T = tokens of the batch, H = hidden size, N = query heads, K = KV heads, W = N + 2·K, D = head dim, F = FFN
columns; X is D with a norm, else 0.
"""

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from apportion.model.kernels.angles import cos_sin
from apportion.model.kernels.exponential import LOG2_E, exp2
from apportion.model.kernels.lanes import NUM_LANES, fma, load, store, sum_of_squares, times
from apportion.model.kernels.op_code import floats, op, pointer, row_type, share
from apportion.native.words import call

_F = np.float32
_COLUMNS = 64
"""Shared out together, so that threads do not write to one cache line."""


@njit(inline="always")
def _norm_row(x_H, weight_H, eps, out_H):
    """out may be x: where arrays may overlap, the compiler leaves a loop without vectors."""
    count, h = len(x_H), 0
    scale = _F(1) / np.sqrt(sum_of_squares(x_H) / _F(count) + eps)
    while h + NUM_LANES <= count:
        store(times(times(load(x_H, h), scale), load(weight_H, h)), out_H, h)
        h += NUM_LANES
    while h < count:
        out_H[h] = x_H[h] * scale * weight_H[h]
        h += 1


_NORM = row_type("weight", "width", floats=("eps",))


@op(_NORM)
def norm(row, number, size):
    """out = RMS norm of x, which it may be."""
    a = carray(pointer(row), 1, _NORM)[0]
    x_TH, out_TH = floats(a.x, (a.rows, a.width)), floats(a.out, (a.rows, a.width))
    start, stop = share(a.rows, number, size)
    for t in range(start, stop):
        _norm_row(x_TH[t], floats(a.weight, a.width), _F(a.eps), out_TH[t])


@op(_NORM)
def add_norm(row, number, size):
    """y += x; out = RMS norm of y."""
    a = carray(pointer(row), 1, _NORM)[0]
    x_TH, sum_TH = floats(a.x, (a.rows, a.width)), floats(a.y, (a.rows, a.width))
    out_TH = floats(a.out, (a.rows, a.width))
    start, stop = share(a.rows, number, size)
    for t in range(start, stop):
        for h in range(a.width):
            sum_TH[t, h] += x_TH[t, h]
        _norm_row(sum_TH[t], floats(a.weight, a.width), _F(a.eps), out_TH[t])


_ADD = row_type("width")


@op(_ADD)
def add(row, number, size):
    """y += x"""
    a = carray(pointer(row), 1, _ADD)[0]
    start, stop = share(a.rows * a.width, number, size)
    x, total = floats(a.x, a.rows * a.width), floats(a.y, a.rows * a.width)
    for at in range(start, stop):
        total[at] += x[at]


_REDUCE = row_type("width", "function", "context")


@op(_REDUCE)
def reduce(row, number, _size):
    """x = its sum over the members of the group, by code of (context, address, rows, columns), for one thread."""
    a = carray(pointer(row), 1, _REDUCE)[0]
    if number == 0:
        call(a.function, (a.context, a.x, a.rows, a.width))


_PAUSE = row_type("function", "context")


@op(_PAUSE)
def pause(row, number, _size):
    """Code of (context), for one thread."""
    a = carray(pointer(row), 1, _PAUSE)[0]
    if number == 0:
        call(a.function, (a.context,))


_ADD_BIAS = row_type("width", "bias")


@op(_ADD_BIAS)
def add_bias(row, number, size):
    """y += bias"""
    a = carray(pointer(row), 1, _ADD_BIAS)[0]
    total_TH, bias_H = floats(a.y, (a.rows, a.width)), floats(a.bias, a.width)
    start, stop = share(a.rows, number, size)
    for t in range(start, stop):
        for h in range(a.width):
            total_TH[t, h] += bias_H[h]


@njit(inline="always")
def _turn(x_D, cos_D, sin_D, out_D):
    half = len(x_D) // 2
    low, high, out_low, out_high = x_D[:half], x_D[half:], out_D[:half], out_D[half:]
    for d in range(half):
        out_low[d] = fma(low[d], cos_D[d], -(high[d] * sin_D[d]))
        out_high[d] = fma(high[d], cos_D[d], low[d] * sin_D[d])


_TURNS = row_type("positions", "frequencies", "head_dim", floats=("amplitude",))


@op(_TURNS)
def turns(row, number, size):
    """cos (x) and sin (y) of the angles at the positions, of which `positions` is the address's address; their second
    halves repeat the first."""
    a = carray(pointer(row), 1, _TURNS)[0]
    half, amplitude = a.head_dim // 2, _F(a.amplitude)
    cos_TD, sin_TD = floats(a.x, (a.rows, a.head_dim)), floats(a.y, (a.rows, a.head_dim))
    frequencies_X = floats(a.frequencies, half)
    positions_T = carray(pointer(carray(pointer(a.positions), 1, np.int64)[0]), a.rows, np.int64)
    start, stop = share(a.rows, number, size)
    for t in range(start, stop):
        for d in range(half):
            cos, sin = cos_sin(_F(positions_T[t]) * frequencies_X[d])
            cos_TD[t, d] = cos_TD[t, half + d] = cos * amplitude
            sin_TD[t, d] = sin_TD[t, half + d] = sin * amplitude


_TAKE = row_type("source", "width")


@op(_TAKE)
def take(row, number, size):
    """out = what lies at the address that lies at `source`."""
    a = carray(pointer(row), 1, _TAKE)[0]
    start, stop = share(a.rows * a.width, number, size)
    given = floats(carray(pointer(a.source), 1, np.int64)[0], a.rows * a.width)
    out = floats(a.out, a.rows * a.width)
    for at in range(start, stop):
        out[at] = given[at]


_SPLIT = row_type("heads", "kv_heads", "head_dim", "query_weight", "key_weight", floats=("eps",))


@op(_SPLIT)
def split(row, number, size):
    """Query, key and value of the projections (x) one after another (out), the first two normed, where there are
    weights for it, and rotated by cos (y) and sin (z), whose second halves repeat the first. x is scratch afterwards.
    """
    a = carray(pointer(row), 1, _SPLIT)[0]
    heads, kv_heads, head_dim = a.heads, a.kv_heads, a.head_dim
    projected_TWD = floats(a.x, (a.rows, heads + 2 * kv_heads, head_dim))
    keys_at = a.rows * heads * head_dim
    whole = floats(a.out, a.rows * (heads + 2 * kv_heads) * head_dim)
    values_at = keys_at + a.rows * kv_heads * head_dim
    query_TND = whole[:keys_at].reshape((a.rows, heads, head_dim))
    key_TKD = whole[keys_at:values_at].reshape((a.rows, kv_heads, head_dim))
    value_TKD = whole[values_at:].reshape((a.rows, kv_heads, head_dim))
    cos_TD, sin_TD = floats(a.y, (a.rows, head_dim)), floats(a.z, (a.rows, head_dim))
    query_weight_D, key_weight_D = floats(a.query_weight, head_dim), floats(a.key_weight, head_dim)
    start, stop = share(a.rows, number, size)
    for t in range(start, stop):
        if a.query_weight != 0:
            for n in range(heads):
                _norm_row(projected_TWD[t, n], query_weight_D, _F(a.eps), projected_TWD[t, n])
            for n in range(heads, heads + kv_heads):
                _norm_row(projected_TWD[t, n], key_weight_D, _F(a.eps), projected_TWD[t, n])
        for n in range(heads):
            _turn(projected_TWD[t, n], cos_TD[t], sin_TD[t], query_TND[t, n])
        for k in range(kv_heads):
            _turn(projected_TWD[t, heads + k], cos_TD[t], sin_TD[t], key_TKD[t, k])
            for d in range(head_dim):
                value_TKD[t, k, d] = projected_TWD[t, heads + kv_heads + k, d]


_GATE = row_type("columns", floats=("linear", "cubic"))


@op(_GATE)
def gate(row, number, size):
    """out = gate · up / (1 + exp(−(linear · gate + cubic · gate³))), of which the gates are the first half of each row
    of x."""
    a = carray(pointer(row), 1, _GATE)[0]
    columns, linear, cubic = a.columns, _F(a.linear), _F(a.cubic)
    gate_up_TG, out_TF = floats(a.x, (a.rows, 2 * columns)), floats(a.out, (a.rows, columns))
    start, stop = share(-(-columns // _COLUMNS), number, size)
    start, stop = start * _COLUMNS, min(stop * _COLUMNS, columns)
    for t in range(a.rows):
        gate_F, up_F = gate_up_TG[t, start:stop], gate_up_TG[t, columns + start : columns + stop]
        out_F = out_TF[t, start:stop]
        for f in range(stop - start):
            x = gate_F[f]
            exponent = (-LOG2_E * x) * fma(cubic * x, x, linear)
            out_F[f] = x * up_F[f] / (_F(1) + exp2(exponent))
