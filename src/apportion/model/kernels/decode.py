"""Attention of sequences with one new token each, over paged keys and values on a CPU: one compiled call.

Keys and values are fp32, or 16 bits wide and widened in registers (`kv_elements` says how they look here); all else is
fp32. What a sequence gets depends on its tokens alone, not on those beside it, nor on where its blocks lie: it passes
its keys in blocks of positions, each with one step of an online softmax (Milakov and Gimelshein, arXiv 1805.02867).

numba compiles it for a format when that is first used on a machine, and keeps the result on disk (`machine_code`).

Shapes: B = sequences, T = tokens of the batch, R = runs of consecutive slots, S = slots of the pool, K = local KV
heads, G = query heads per KV head, C = keys of a block, D = head dim.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from apportion.model.kernels.attention_code import (
    TILE_KEYS,
    TILE_ROWS,
    TILE_VECTORS,
    prefetch,
    score_tile,
    value_tile,
)
from apportion.model.kernels.exponential import LOG2_E, exp2
from apportion.model.kernels.kv_elements import beyond_range, narrowed, widened
from apportion.model.kernels.lanes import NUM_LANES, fma
from apportion.model.kernels.softmax import cap, hide, highest, scale, weigh
from apportion.native.machine_code import named

_BLOCK_KEYS = 256
"""Positions of a block."""
_SUMMED_KEYS = 16
"""Values of which an output's tile is written back: fetching ahead comes between."""
_PREFETCH_KEYS = 32
"""How far ahead keys and values are fetched: the core's own prefetcher stops at pages."""
_LINE_BYTES = 64
_F = np.float32

_score_most, _score_2, _score_1 = (score_tile(rows, TILE_KEYS) for rows in (TILE_ROWS, 2, 1))
_score_single = score_tile(1, 1)
_value_most, _value_2, _value_1 = (value_tile(rows, TILE_VECTORS) for rows in (TILE_ROWS, 2, 1))
_value_narrow = value_tile(1, 1)


@njit(inline="always")
def _prefetch_rows(rows_SD, start, count):
    head_dim = rows_SD.shape[1]
    stop = min(start + count, len(rows_SD)) * head_dim
    for at in range(start * head_dim, stop, _LINE_BYTES // rows_SD.itemsize):
        prefetch(rows_SD, at)


@njit
def _score(query_GD, keys_SD, start, count, scores_GC, at):
    """scores[g, at + i] = query[g] · keys[start + i] for `count` keys."""
    group, head_dim = query_GD.shape
    vectors, width = head_dim // NUM_LANES, scores_GC.shape[1]
    tiled = count - count % TILE_KEYS
    for i in range(0, tiled, TILE_KEYS):
        _prefetch_rows(keys_SD, start + i + _PREFETCH_KEYS, TILE_KEYS)
        k, to, g = (start + i) * head_dim, at + i, 0
        while g + TILE_ROWS <= group:
            q = g * head_dim
            _score_most(query_GD, q, keys_SD, k, head_dim, vectors, scores_GC, g * width + to, width)
            g += TILE_ROWS
        while g + 2 <= group:
            q = g * head_dim
            _score_2(query_GD, q, keys_SD, k, head_dim, vectors, scores_GC, g * width + to, width)
            g += 2
        if g < group:
            q = g * head_dim
            _score_1(query_GD, q, keys_SD, k, head_dim, vectors, scores_GC, g * width + to, width)
    for i in range(tiled, count):
        k, to = (start + i) * head_dim, at + i
        for g in range(group):
            q = g * head_dim
            _score_single(query_GD, q, keys_SD, k, head_dim, vectors, scores_GC, g * width + to, width)
    for d in range(vectors * NUM_LANES, head_dim):
        for g in range(group):
            for i in range(count):
                key = widened(keys_SD[start + i, d])
                scores_GC[g, at + i] = fma(query_GD[g, d], key, scores_GC[g, at + i])


@njit
def _accumulate(weights_GC, at, values_SD, start, count, out_GD):
    """out[g] += sum over i of weights[g, at + i] · values[start + i], for `count` values, in their order"""
    group, head_dim = out_GD.shape
    vectors, width = head_dim // NUM_LANES, weights_GC.shape[1]
    in_tiles = vectors - vectors % TILE_VECTORS
    for i in range(0, count, _SUMMED_KEYS):
        num, w = min(_SUMMED_KEYS, count - i), at + i
        _prefetch_rows(values_SD, start + i + _PREFETCH_KEYS, num)
        for d in range(0, in_tiles * NUM_LANES, TILE_VECTORS * NUM_LANES):
            v, g = (start + i) * head_dim + d, 0
            while g + TILE_ROWS <= group:
                to = g * head_dim + d
                _value_most(weights_GC, g * width + w, width, values_SD, v, head_dim, num, out_GD, to)
                g += TILE_ROWS
            while g + 2 <= group:
                to = g * head_dim + d
                _value_2(weights_GC, g * width + w, width, values_SD, v, head_dim, num, out_GD, to)
                g += 2
            if g < group:
                to = g * head_dim + d
                _value_1(weights_GC, g * width + w, width, values_SD, v, head_dim, num, out_GD, to)
        for d in range(in_tiles * NUM_LANES, vectors * NUM_LANES, NUM_LANES):
            v = (start + i) * head_dim + d
            for g in range(group):
                to = g * head_dim + d
                _value_narrow(weights_GC, g * width + w, width, values_SD, v, head_dim, num, out_GD, to)
    for d in range(vectors * NUM_LANES, head_dim):
        for g in range(group):
            for i in range(count):
                value = widened(values_SD[start + i, d])
                out_GD[g, d] = fma(weights_GC[g, at + i], value, out_GD[g, d])


@njit(error_model="numpy")
def _weigh(scores_C, count, factor, softcap, before, total, out_D):
    """Replaces a block's `count` scores by their weights against the highest so far, to which what there was before is
    scaled; returns the highest and the sum."""
    row_C = scores_C[: -(-count // NUM_LANES) * NUM_LANES]
    if softcap > 0:
        cap(row_C, factor / softcap, softcap)
    else:
        scale(row_C, factor * LOG2_E)
    hide(row_C, 0, count)
    top = highest(row_C, before)
    block_total = weigh(row_C, top)
    if top == before:
        return top, total + block_total
    rest = exp2(before - top)
    for d in range(len(out_D)):
        out_D[d] *= rest
    return top, fma(total, rest, block_total)


@njit
def _next_run(runs_R2, run, passed, count):
    """From `passed` slots into a run, `count` further: the run and how many of its slots are passed."""
    passed += count
    while run < len(runs_R2) and passed >= runs_R2[run, 1]:
        passed -= runs_R2[run, 1]
        run += 1
    return run, passed


@njit(error_model="numpy")
def _attend_head(
    query_GD, keys_SD, values_SD, runs_R2, first_key, num_tokens, factor, softcap, sinks_GX, out_GD
):
    """Of the keys at positions `[first_key, num_tokens)`."""
    group = len(query_GD)
    scores_GC = np.empty((group, _BLOCK_KEYS), np.float32)
    highest_G, total_G = np.full(group, -np.inf, np.float32), np.zeros(group, np.float32)
    if sinks_GX.shape[1]:
        highest_G[:], total_G[:] = sinks_GX[:, 0] * LOG2_E, _F(1)
    out_GD[:, :] = 0
    run, passed = _next_run(runs_R2, 0, 0, first_key)
    position = first_key
    while position < num_tokens:
        count = min(num_tokens, position - position % _BLOCK_KEYS + _BLOCK_KEYS) - position
        at, this, done = 0, run, passed
        while at < count:
            piece = min(count - at, runs_R2[this, 1] - done)
            _score(query_GD, keys_SD, runs_R2[this, 0] + done, piece, scores_GC, at)
            this, done = _next_run(runs_R2, this, done, piece)
            at += piece
        for g in range(group):
            highest_G[g], total_G[g] = _weigh(
                scores_GC[g], count, factor, softcap, highest_G[g], total_G[g], out_GD[g]
            )
        at = 0
        while at < count:
            piece = min(count - at, runs_R2[run, 1] - passed)
            _accumulate(scores_GC, at, values_SD, runs_R2[run, 0] + passed, piece, out_GD)
            run, passed = _next_run(runs_R2, run, passed, piece)
            at += piece
        position += count
    for g in range(group):
        share = _F(1) / total_G[g]
        for d in range(out_GD.shape[1]):
            out_GD[g, d] *= share


@njit
def _write(x_D, stored_D):
    """Returns whether a number was too large for the pool's format."""
    beyond = 0
    for d in range(len(x_D)):
        stored_D[d] = narrowed(x_D[d], stored_D)
        beyond |= beyond_range(stored_D[d])
    return beyond


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
    beyond_1,
    window_tokens,
    factor,
    softcap,
    sinks_KGX,
    out_TKGD,
    first,
    stop,
):
    """Writes the new keys and values at `rows_B` to `slots_B`, and what attention gives to the same rows of out_TKGD;
    of the pairs b · K + k in `[first, stop)`.

    Sequence b's slots are the runs (start, count) `[first_run_B[b], first_run_B[b + 1])`, of which the last
    `window_tokens` are seen. `softcap` 0 stands for none; X is 1 with sinks, else 0. `factor` (of scores) and
    `softcap` are fp32.
    `beyond_1` becomes 1 where a number is too large for the pool's format.
    """
    kv_heads = len(keys_KSD)
    for pair in range(first, stop):
        b, k = pair // kv_heads, pair % kv_heads
        row, slot = rows_B[b], slots_B[b]
        runs = runs_R2[first_run_B[b] : first_run_B[b + 1]]
        num_tokens = runs[:, 1].sum()
        beyond = _write(key_TKD[row, k], keys_KSD[k, slot]) | _write(value_TKD[row, k], values_KSD[k, slot])
        if beyond:
            beyond_1[0] = 1
        _attend_head(
            query_TKGD[row, k], keys_KSD[k], values_KSD[k], runs, max(0, num_tokens - window_tokens), num_tokens,
            factor, softcap, sinks_KGX[k], out_TKGD[row, k],
        )  # fmt: skip


attend_pairs: Callable[..., None] = njit(_attend_decode)
"""For compiled code."""


@cache
def attend_decode(elements: "np.dtype[Any]") -> Callable[..., None]:
    """For a pool of that type."""
    return njit(nogil=True, cache=True)(named(_attend_decode, elements.name))
