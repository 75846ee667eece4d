"""Attention of sequences with one new token each, over paged keys and values in fp32 on a CPU: one compiled call.

What a sequence gets depends on it alone. numba compiles it when this module is first imported on a machine, and keeps
the result on disk.

Shapes: B = sequences, T = tokens of the batch, R = runs of consecutive slots, S = slots of the pool, K = local KV
heads, G = query heads per KV head, C = keys a sequence sees, D = head dim.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be reordered; infinities keep their meaning."""
_TILE_KEYS = 8
_PREFETCH_KEYS = 32
"""How far ahead keys and values are fetched: the core's own prefetcher stops at pages."""
_LINE_ELEMENTS = 16
_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_LOWEST_EXPONENT = np.float32(-126)
_EXPONENT_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)
_F = np.float32


def _emit_prefetch(_context: Any, array: Any, index: Any) -> Any:
    """Fetches the cache line of element `index`, counted in memory."""

    def emit(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, word, word, word]), "llvm.prefetch.p0"
        )
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(function, [pointer, *(ir.Constant(word, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    del index
    return types.void(array, types.intp), emit


_prefetch: Callable[..., None] = intrinsic(_emit_prefetch)


@njit(fastmath=_FAST, inline="always")
def _prefetch_rows(rows_SD, start, count):
    head_dim = rows_SD.shape[1]
    for index in range(start * head_dim, min(start + count, len(rows_SD)) * head_dim, _LINE_ELEMENTS):
        _prefetch(rows_SD, index)


@njit(fastmath=_FAST, inline="always")
def _score(query_D, keys_SD, row, count, scale, scores_C, at):
    """scores_C[at + i] = scale · query · keys[row + i]"""
    head_dim = len(query_D)
    in_fours = count - count % 4
    for i in range(0, in_fours, 4):
        sum_0, sum_1, sum_2, sum_3 = _F(0), _F(0), _F(0), _F(0)
        for d in range(head_dim):
            sum_0 += query_D[d] * keys_SD[row + i, d]
            sum_1 += query_D[d] * keys_SD[row + i + 1, d]
            sum_2 += query_D[d] * keys_SD[row + i + 2, d]
            sum_3 += query_D[d] * keys_SD[row + i + 3, d]
        scores_C[at + i], scores_C[at + i + 1] = sum_0 * scale, sum_1 * scale
        scores_C[at + i + 2], scores_C[at + i + 3] = sum_2 * scale, sum_3 * scale
    for i in range(in_fours, count):
        sum_0 = _F(0)
        for d in range(head_dim):
            sum_0 += query_D[d] * keys_SD[row + i, d]
        scores_C[at + i] = sum_0 * scale


@njit(fastmath=_FAST, inline="always")
def _accumulate(weights_C, at, values_SD, row, count, out_D):
    """out += sum over i of weights[at + i] · values[row + i]"""
    head_dim = len(out_D)
    in_eights = count - count % 8
    for i in range(0, in_eights, 8):
        a, r = at + i, row + i
        w0, w1, w2, w3 = weights_C[a], weights_C[a + 1], weights_C[a + 2], weights_C[a + 3]
        w4, w5, w6, w7 = weights_C[a + 4], weights_C[a + 5], weights_C[a + 6], weights_C[a + 7]
        for d in range(head_dim):
            low = w0 * values_SD[r, d] + w1 * values_SD[r + 1, d]
            low += w2 * values_SD[r + 2, d] + w3 * values_SD[r + 3, d]
            high = w4 * values_SD[r + 4, d] + w5 * values_SD[r + 5, d]
            high += w6 * values_SD[r + 6, d] + w7 * values_SD[r + 7, d]
            out_D[d] += low + high
    for i in range(in_eights, count):
        for d in range(head_dim):
            out_D[d] += weights_C[at + i] * values_SD[row + i, d]


@njit(fastmath=_FAST)
def _exp_sum(scores_C, highest, powers_C):
    """Replaces each score by exp(score − highest) and returns their sum. A polynomial, because it vectorises: 2^k · e^r
    with |r| ≤ ln 2 / 2, relative error below 2e-7. `powers_C` is scratch."""
    bits_C = powers_C.view(np.int32)
    for i in range(len(scores_C)):
        x = max((scores_C[i] - highest) * _LOG2_E, _LOWEST_EXPONENT)
        k = np.floor(x + _F(0.5))
        r = (x - k) * _LN_2
        tail = _F(1 / 6) + r * (_F(1 / 24) + r * (_F(1 / 120) + r * _F(1 / 720)))
        scores_C[i] = _F(1) + r * (_F(1) + r * (_F(0.5) + r * tail))
        bits_C[i] = (np.int32(k) + _EXPONENT_BIAS) << _MANTISSA_BITS
    total = _F(0)
    for i in range(len(scores_C)):
        weight = scores_C[i] * powers_C[i]
        scores_C[i] = weight
        total += weight
    return total


@njit(fastmath=_FAST)
def _softmax(scores_C, softcap, sinks, powers_C):
    """In place. `softcap` 0 stands for none; `sinks` holds the head's sink or nothing."""
    if softcap > 0:
        for i in range(len(scores_C)):
            scores_C[i] = softcap * np.tanh(scores_C[i] / softcap)
    highest = sinks[0] if len(sinks) else scores_C[0]
    for i in range(len(scores_C)):
        highest = max(highest, scores_C[i])
    total = _exp_sum(scores_C, highest, powers_C)
    if len(sinks):
        total += np.exp(sinks[0] - highest)
    share = _F(1) / total
    for i in range(len(scores_C)):
        scores_C[i] *= share


@njit(fastmath=_FAST)
def _score_runs(query_GD, keys_SD, runs_R2, skipped, scale, scores_GC):
    at = -skipped
    for run in range(len(runs_R2)):
        start, count = runs_R2[run, 0], runs_R2[run, 1]
        for i in range(min(max(0, -at), count), count, _TILE_KEYS):
            tile = min(_TILE_KEYS, count - i)
            _prefetch_rows(keys_SD, start + i + _PREFETCH_KEYS, tile)
            for g in range(len(query_GD)):
                _score(query_GD[g], keys_SD, start + i, tile, scale, scores_GC[g], at + i)
        at += count


@njit(fastmath=_FAST)
def _accumulate_runs(weights_GC, values_SD, runs_R2, skipped, out_GD):
    out_GD[:, :] = 0
    at = -skipped
    for run in range(len(runs_R2)):
        start, count = runs_R2[run, 0], runs_R2[run, 1]
        for i in range(min(max(0, -at), count), count, _TILE_KEYS):
            tile = min(_TILE_KEYS, count - i)
            _prefetch_rows(values_SD, start + i + _PREFETCH_KEYS, tile)
            for g in range(len(out_GD)):
                _accumulate(weights_GC[g], at + i, values_SD, start + i, tile, out_GD[g])
        at += count


_INTS, _INT_PAIRS = types.int64[::1], types.int64[:, ::1]
_CUBE, _TESSERACT = types.float32[:, :, ::1], types.float32[:, :, :, ::1]
_SIGNATURE = types.void(
    *(_TESSERACT, _CUBE, _CUBE),
    *(_INTS, _INTS, _INT_PAIRS, _INTS),
    *(_CUBE, _CUBE, types.int64, types.float32, types.float32, types.float32[:, :, ::1], _TESSERACT),
)


def _attend_decode(
    query_TKGD,
    key_TKD,
    value_TKD,
    rows_B,
    slots_B,
    runs_R2,
    first_run_B,
    keys_KSD,
    values_KSD,
    window_tokens,
    scale,
    softcap,
    sinks_KGX,
    out_TKGD,
):
    """Writes the new keys and values at `rows_B` to `slots_B`, and what attention gives to the same rows of out_TKGD.

    Sequence b's slots are the runs (start, count) `[first_run_B[b], first_run_B[b + 1])`, of which the last
    `window_tokens` are seen. `softcap` 0 stands for none; X is 1 with sinks, else 0.
    """
    for b in range(len(rows_B)):
        row, slot = rows_B[b], slots_B[b]
        runs = runs_R2[first_run_B[b] : first_run_B[b + 1]]
        num_tokens = runs[:, 1].sum()
        num_keys = min(num_tokens, window_tokens)
        group = query_TKGD.shape[2]
        scores_GC, powers_C = np.empty((group, num_keys), np.float32), np.empty(num_keys, np.float32)
        for k in range(len(keys_KSD)):
            keys_KSD[k, slot] = key_TKD[row, k]
            values_KSD[k, slot] = value_TKD[row, k]
            _score_runs(query_TKGD[row, k], keys_KSD[k], runs, num_tokens - num_keys, scale, scores_GC)
            for g in range(group):
                _softmax(scores_GC[g], softcap, sinks_KGX[k, g], powers_C)
            _accumulate_runs(scores_GC, values_KSD[k], runs, num_tokens - num_keys, out_TKGD[row, k])


attend_decode: Callable[..., None] = njit(_SIGNATURE, fastmath=_FAST, nogil=True, cache=True)(_attend_decode)
