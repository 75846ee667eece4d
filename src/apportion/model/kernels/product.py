"""The product of fp32 activations with packed weights on a CPU, compiled for it.

Packed weights are panels of `PANEL_ROWS` output rows (the last of fewer, filled up to whole vectors), a panel's
elements column by column. Few rows of activations are as fast as memory is read, many as the core multiplies
(docs/benchmarks/linear-formats.md). A row's result depends neither on the rows beside it nor on their number.

numba compiles it for a format when that is first used on a machine, and keeps the result on disk (`machine_code`).

Shapes: M = rows of activations, N = output rows, K = columns.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from apportion.model.kernels.op_code import Op, floats, op, pointer, row_type, share
from apportion.model.kernels.tile_code import LANES, PANEL_VECTORS, TILE_ROWS, tile

PANEL_ROWS = PANEL_VECTORS * LANES
_BLOCK_ROWS, _BLOCK_COLUMNS = 64, 512
"""Of activations, that pass a part of a panel while it is in the cache. Short sums are also the more exact ones."""


def _panel_of(vectors: int) -> Any:
    """Rows `[row, stop)` of activations by one panel of `vectors`, whose results begin at `out_at`."""
    tile_most, tile_4, tile_2, tile_1 = (tile(rows, vectors) for rows in (TILE_ROWS, 4, 2, 1))
    panel_rows = vectors * LANES

    @njit
    def panel(x_MK, row, stop, weights, start, scales_N, first, out_MN, out_at):
        columns, width = x_MK.shape[1], out_MN.shape[1]
        for column in range(0, columns, _BLOCK_COLUMNS):
            count, add = min(_BLOCK_COLUMNS, columns - column), min(column, 1)
            at, to, x_at, left = start + column * panel_rows, out_at, row * columns + column, stop - row
            while left >= TILE_ROWS:
                tile_most(x_MK, x_at, weights, at, count, scales_N, first, out_MN, to, add)
                x_at, to, left = x_at + TILE_ROWS * columns, to + TILE_ROWS * width, left - TILE_ROWS
            if left >= 4:
                tile_4(x_MK, x_at, weights, at, count, scales_N, first, out_MN, to, add)
                x_at, to, left = x_at + 4 * columns, to + 4 * width, left - 4
            if left >= 2:
                tile_2(x_MK, x_at, weights, at, count, scales_N, first, out_MN, to, add)
                x_at, to, left = x_at + 2 * columns, to + 2 * width, left - 2
            if left >= 1:
                tile_1(x_MK, x_at, weights, at, count, scales_N, first, out_MN, to, add)

    return panel


_panel_1, _panel_2, _panel_3 = (_panel_of(vectors) for vectors in (1, 2, PANEL_VECTORS))


@njit
def _multiply(x_MK, weights, scales_N, out_MN, first_panel, stop_panel):
    """Writes the columns of `out_MN` that belong to the panels `[first_panel, stop_panel)`.

    `scales_N` is each row's scale where weights are int8, else unused, filled up to whole vectors like the weights."""
    columns, width = x_MK.shape[1], out_MN.shape[1]
    for row in range(0, len(x_MK), _BLOCK_ROWS):
        stop = min(row + _BLOCK_ROWS, len(x_MK))
        for panel in range(first_panel, stop_panel):
            first, start = panel * PANEL_ROWS, panel * PANEL_ROWS * columns
            count = min(PANEL_ROWS, width - first)
            vectors = -(-count // LANES)
            filled = vectors * LANES == count
            results_MN = out_MN if filled else np.empty((stop - row, vectors * LANES), np.float32)
            to = row * width + first if filled else 0
            if vectors == 1:
                _panel_1(x_MK, row, stop, weights, start, scales_N, first, results_MN, to)
            elif vectors == 2:
                _panel_2(x_MK, row, stop, weights, start, scales_N, first, results_MN, to)
            else:
                _panel_3(x_MK, row, stop, weights, start, scales_N, first, results_MN, to)
            if not filled:
                out_MN[row:stop, first:] = results_MN[:, :count]


_PRODUCT = row_type("weights", "scales", "columns", "width", "bias")


@cache
def product_op(weights: "np.dtype[Any]") -> Op:
    """out = x · weights (· scales) + bias, of `columns` columns and `width` output rows; the bias may be missing (0).

    `weights` is the type of the packed array: int16 stands for fp16, uint16 for bfloat16."""

    @op(_PRODUCT, weights.name)
    def product(row, number, size):
        a = carray(pointer(row), 1, _PRODUCT)[0]
        filled = -(-a.width // LANES) * LANES
        x_MK, out_MN = floats(a.x, (a.rows, a.columns)), floats(a.out, (a.rows, a.width))
        weights_array = carray(pointer(a.weights), filled * a.columns, weights)
        start, stop = share(-(-a.width // PANEL_ROWS), number, size)
        _multiply(x_MK, weights_array, floats(a.scales, filled), out_MN, start, stop)
        if a.bias != 0:
            bias_N = floats(a.bias, a.width)
            for m in range(a.rows):
                for n in range(start * PANEL_ROWS, min(stop * PANEL_ROWS, a.width)):
                    out_MN[m, n] += bias_N[n]

    return product
