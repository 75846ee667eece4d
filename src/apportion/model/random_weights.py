"""Stands in for a checkpoint: any tensor, of any shape, filled with noise, so that a config alone can be timed.

An element depends on the tensor's name and its place in it alone, so every division of a model sees the same values.
Matrices are scaled by 1/sqrt(fan-in), norms are ones and biases zeros: activations stay of order one.
"""

import math
import zlib
from functools import cache

import numpy as np
import torch
from torch import Tensor

from apportion.model.weights import PIECE_BYTES, Range

_PERIOD = 262139
"""Values drawn, which then repeat along a tensor; a prime, so that its rows begin at different ones."""


@cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(_PERIOD, dtype=np.float32)


class RandomWeights:
    """See `Checkpoint`, whose place it takes: it has whatever is asked for, in the shape that is asked for."""

    read_bytes = 0

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __contains__(self, name: str) -> bool:
        """None of the other names that a parameter may have: it goes by the one that its family's files use."""
        return False

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._shapes[name] = shape

    def will_read(self, name: str) -> None:
        pass

    def read_into(self, target: Tensor, name: str, ranges: tuple[Range, ...]) -> None:
        """Fills `target` with the hyper-rectangle `ranges` of tensor `name`, in the shape last checked."""
        shape = self._shapes[name]
        if len(shape) < 2:
            target.fill_(0 if name.endswith("bias") else 1)
            return
        values = np.resize(_noise(), _PERIOD + target.shape[-1]) * np.float32(shape[-1] ** -0.5)
        _fill(target, shape, ranges, zlib.crc32(name.encode()), values)

    def row_peaks(self, name: str, start: int, stop: int) -> Tensor:
        columns = self._shapes[name][1]
        row_1K = torch.empty(1, columns)
        peaks_R = torch.empty(stop - start)
        for row in range(start, stop):
            self.read_into(row_1K, name, ((row, row + 1), (0, columns)))
            peaks_R[row - start] = row_1K.abs().max()
        return peaks_R


def _fill(
    target: Tensor, shape: tuple[int, ...], ranges: tuple[Range, ...], at: int, values: np.ndarray
) -> None:
    """`at` is the place of the tensor's first element among the values, which repeat after `_PERIOD`."""
    (start, stop), *rest = ranges
    row_items = math.prod(shape[1:])
    if len(rest) > 1:
        for row in range(start, stop):
            _fill(target[row - start], shape[1:], tuple(rest), at + row * row_items, values)
        return
    ((column, column_stop),) = rest
    width = column_stop - column
    rows_per_piece = max(1, PIECE_BYTES // values.itemsize // width)
    for first in range(start, stop, rows_per_piece):
        rows = range(first, min(first + rows_per_piece, stop))
        begins = [(at + row * row_items + column) % _PERIOD for row in rows]
        piece = np.stack([values[begin : begin + width] for begin in begins])
        target[first - start : rows.stop - start].copy_(torch.from_numpy(piece))
