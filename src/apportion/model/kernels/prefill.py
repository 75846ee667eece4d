"""Attention of one sequence's several new tokens over paged keys and values on a CPU: one compiled call.

Keys are taken in blocks of positions, counted from the sequence's first. A block's keys and values are
copied side by side, in the panels of `tile_code`, and serve all query heads of their KV head; the softmax is gathered
block by block (as in `decode`). What a token gets depends on its position and its sequence alone, not on how the
prompt is cut into chunks. Elements of 16 bits (`kv_elements`) are copied as they are and widened by the products.

Shapes: Q = new tokens, K = local KV heads, G = query heads per KV head, D = head dim, V = D filled up to whole panels,
S = slots of the pool, R = runs of consecutive slots, E = rows, a token's G side by side, C = keys of a block, X = 1
with sinks, else 0.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from apportion.model.kernels.exponential import LOG2_E, exp2
from apportion.model.kernels.softmax import cap, hide, highest, weigh
from apportion.model.kernels.tile_code import LANES, TILE_ROWS, tile
from apportion.native.machine_code import named
from apportion.types.layout import PREFILL_BLOCK_KEYS, PREFILL_ROWS

_PANEL_VECTORS = 2
PANEL_LANES = _PANEL_VECTORS * LANES
_F = np.float32
_NO_SCALES = np.empty(0, np.float32)
_tile_most, _tile_4, _tile_2, _tile_1 = (tile(rows, _PANEL_VECTORS) for rows in (TILE_ROWS, 4, 2, 1))


@njit
def _multiply(x_EC, panels, columns, out_EV, add):
    """x · panels, of `columns` columns each, as many as fill the rows of `out_EV`; added to it where `add` is 1."""
    rows, width, lanes = len(x_EC), out_EV.shape[1], _PANEL_VECTORS * LANES
    x_width = x_EC.shape[1]
    for lane in range(0, width, lanes):
        at, row = lane * columns, 0
        while rows - row >= TILE_ROWS:
            _tile_most(
                x_EC, row * x_width, panels, at, columns, _NO_SCALES, 0, out_EV, row * width + lane, add
            )
            row += TILE_ROWS
        if rows - row >= 4:
            _tile_4(x_EC, row * x_width, panels, at, columns, _NO_SCALES, 0, out_EV, row * width + lane, add)
            row += 4
        if rows - row >= 2:
            _tile_2(x_EC, row * x_width, panels, at, columns, _NO_SCALES, 0, out_EV, row * width + lane, add)
            row += 2
        if rows - row >= 1:
            _tile_1(x_EC, row * x_width, panels, at, columns, _NO_SCALES, 0, out_EV, row * width + lane, add)


@njit
def _pack(keys_SD, values_SD, slots_C, count, key_panels, value_panels):
    """Key panels have a key in each lane and pass the elements, value panels an element in each lane and pass the keys.

    What is beyond `count` keys keeps what it had, all of it finite."""
    head_dim, lanes = keys_SD.shape[1], _PANEL_VECTORS * LANES
    for c in range(count):
        at = c // lanes * lanes * head_dim + c % lanes
        key_D, value_D = keys_SD[slots_C[c]], values_SD[slots_C[c]]
        for d in range(head_dim):
            key_panels[at + d * lanes] = key_D[d]
        for first in range(0, head_dim, lanes):
            to = first * PREFILL_BLOCK_KEYS + c * lanes
            for d in range(min(lanes, head_dim - first)):
                value_panels[to + d] = value_D[first + d]


@njit(error_model="numpy")
def _weigh(scores_EC, first_row, stop_row, state_E2, out_EV):
    """Replaces the scores by their weights against the highest so far; brings what was gathered before to the same
    measure."""
    for e in range(first_row, stop_row):
        before = state_E2[e, 0]
        top = highest(scores_EC[e], before)
        total = weigh(scores_EC[e], top)
        if top > before:
            shrunk = exp2(before - top)
            for v in range(out_EV.shape[1]):
                out_EV[e, v] *= shrunk
            state_E2[e, 0], state_E2[e, 1] = top, state_E2[e, 1] * shrunk
        state_E2[e, 1] += total


@njit
def _start(query_QGD, softcap, scale, sinks_GX, query_ED, state_E2, out_EV):
    """Rows token by token; `state_E2` holds the highest score and the sum of weights against it."""
    num, group, head_dim = query_QGD.shape
    factor = scale if softcap > 0 else scale * LOG2_E
    for e in range(num * group):
        q, g = e // group, e % group
        for d in range(head_dim):
            query_ED[e, d] = query_QGD[q, g, d] * factor
        state_E2[e, 0] = sinks_GX[g, 0] * LOG2_E if sinks_GX.shape[1] else _F(-np.inf)
        state_E2[e, 1] = sinks_GX.shape[1]
    out_EV[: num * group] = 0


@njit
def _finish(out_EV, state_E2, out_QGD):
    num, group, head_dim = out_QGD.shape
    for e in range(num * group):
        share = _F(1) / state_E2[e, 1]
        for d in range(head_dim):
            out_QGD[e // group, e % group, d] = out_EV[e, d] * share


@njit
def _slots(runs_R2, first, count, slots_C):
    """Those of positions `[first, first + count)`."""
    at = 0
    for run in range(len(runs_R2)):
        stop = at + runs_R2[run, 1]
        for position in range(max(first, at), min(first + count, stop)):
            slots_C[position - first] = runs_R2[run, 0] + position - at
        at = stop
        if at >= first + count:
            return


@njit(error_model="numpy")
def _gather_block(block, start, rows, group, count, scratch, window_tokens, softcap):
    """What the keys from position `block` on add to `rows` rows, of tokens from position `start` on."""
    query_ED, scores_EC, out_EV, state_E2, key_panels, value_panels, _slots_C = scratch
    first = max(0, block - start) * group
    stop = min(rows // group, block + count - 1 + window_tokens - start) * group
    _multiply(query_ED[first:stop], key_panels, query_ED.shape[1], scores_EC[first:stop], 0)
    if softcap > 0:
        for e in range(first, stop):
            cap(scores_EC[e], _F(1) / softcap, softcap)
    for e in range(first, stop):
        seen_stop = start + e // group + 1 - block
        if seen_stop < PREFILL_BLOCK_KEYS or seen_stop > window_tokens:
            hide(scores_EC[e], min(PREFILL_BLOCK_KEYS, seen_stop - window_tokens), seen_stop)
    _weigh(scores_EC, first, stop, state_E2, out_EV)
    _multiply(scores_EC[first:stop], value_panels, PREFILL_BLOCK_KEYS, out_EV[first:stop], 1)


@njit
def _attend_tile(query_QGD, start, runs_R2, keys_SD, values_SD, options, sinks_GX, out_QGD, scratch):
    """Tokens at positions from `start` on, by one KV head."""
    query_ED, _scores_EC, out_EV, state_E2, key_panels, value_panels, slots_C = scratch
    window_tokens, scale, softcap = options
    num, group, _ = query_QGD.shape
    _start(query_QGD, softcap, scale, sinks_GX, query_ED, state_E2, out_EV)
    begin = max(0, start - window_tokens + 1) // PREFILL_BLOCK_KEYS * PREFILL_BLOCK_KEYS
    for block in range(begin, start + num, PREFILL_BLOCK_KEYS):
        count = min(PREFILL_BLOCK_KEYS, start + num - block)
        _slots(runs_R2, block, count, slots_C)
        _pack(keys_SD, values_SD, slots_C, count, key_panels, value_panels)
        _gather_block(block, start, num * group, group, count, scratch, window_tokens, softcap)
    _finish(out_EV, state_E2, out_QGD)


@njit
def _scratch(rows, head_dim, keys_KSD):
    filled = -(-head_dim // PANEL_LANES) * PANEL_LANES
    return (
        np.empty((rows, head_dim), np.float32),
        np.empty((rows, PREFILL_BLOCK_KEYS), np.float32),
        np.empty((rows, filled), np.float32),
        np.empty((rows, 2), np.float32),
        np.zeros(PREFILL_BLOCK_KEYS * head_dim, keys_KSD.dtype),
        np.zeros(PREFILL_BLOCK_KEYS * filled, keys_KSD.dtype),
        np.empty(PREFILL_BLOCK_KEYS, np.int64),
    )


def _tokens(group):
    """Of a sequence, taken at once."""
    return max(1, PREFILL_ROWS // group)


_tile_tokens: Callable[..., int] = njit(_tokens)


def _attend_prefill(
    query_QKGD, start, runs_R2, keys_KSD, values_KSD, options, sinks_KGX, out_QKGD, first, stop
):
    """Writes the parts `[first, stop)` of `num_parts` of out_QKGD: tokens at positions from `start` on of the sequence
    whose slots are the runs (first, count). Their own keys and values are in the pool.

    `options` are how many tokens one sees, itself included, the scale, and the scores' cap or 0.
    """
    num, _, group, head_dim = query_QKGD.shape
    tile = _tile_tokens(group)
    tiles = -(-num // tile)
    scratch = _scratch(min(num, tile) * group, head_dim, keys_KSD)
    for part in range(first, stop):
        k, at = part // tiles, part % tiles * tile
        _attend_tile(
            query_QKGD[at : at + tile, k],
            start + at,
            runs_R2,
            keys_KSD[k],
            values_KSD[k],
            options,
            sinks_KGX[k],
            out_QKGD[at : at + tile, k],
            scratch,
        )


@cache
def attend_prefill(elements: "np.dtype[Any]") -> Callable[..., None]:
    """For a pool of that type."""
    return njit(nogil=True, cache=True)(named(_attend_prefill, elements.name))


def num_parts(query_QKGD: np.ndarray) -> int:
    num, kv_heads, group, _ = query_QKGD.shape
    return kv_heads * -(-num // _tokens(group))
