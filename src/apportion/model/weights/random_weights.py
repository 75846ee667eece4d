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

from apportion.model.weights.checkpoint import Range
from apportion.model.weights.matrix_source import MatrixSource
from apportion.model.weights.shard import whole_placements

PIECE_BYTES = 2**18
"""Of values that are made at once."""

_PERIOD = 262139
"""Values drawn, which then repeat along a tensor; a prime, so that its rows begin at different ones."""


@cache
def _noise(num_periods: int = 2) -> np.ndarray:
    """From any place in the first period a row of one period less than `num_periods` can be read."""
    return np.resize(
        np.random.default_rng(0).standard_normal(_PERIOD, dtype=np.float32), num_periods * _PERIOD
    )


def _row_noise(columns: int) -> np.ndarray:
    return _noise(1 + -(-columns // _PERIOD))


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

    def read_into(self, target: Tensor, name: str, ranges: tuple[Range, ...]) -> None:
        """Fills `target` with the hyper-rectangle `ranges` of tensor `name`, in the shape last checked."""
        shape = self._shapes[name]
        if len(shape) < 2:
            target.fill_(0 if name.endswith("bias") else 1)
            return
        _fill(target, shape, ranges, zlib.crc32(name.encode()), np.float32(shape[-1] ** -0.5))

    def row_peaks(self, name: str, start: int, stop: int) -> Tensor:
        columns = self._shapes[name][1]
        at, noise = zlib.crc32(name.encode()), _row_noise(columns)
        begins = ((at + row * columns) % _PERIOD for row in range(start, stop))
        peaks = [np.abs(noise[begin : begin + columns]).max() for begin in begins]
        return torch.from_numpy(np.array(peaks, np.float32) * np.float32(columns**-0.5))


def _fill(
    target: Tensor, shape: tuple[int, ...], ranges: tuple[Range, ...], at: int, scale: np.float32
) -> None:
    """`at` is the place of the tensor's first element in the noise, which repeats after `_PERIOD`."""
    (start, stop), *rest = ranges
    row_items = math.prod(shape[1:])
    if len(rest) > 1:
        for row in range(start, stop):
            _fill(target[row - start], shape[1:], tuple(rest), at + row * row_items, scale)
        return
    ((column, column_stop),) = rest
    width = column_stop - column
    noise = _row_noise(shape[-1])
    rows_per_piece = max(1, PIECE_BYTES // noise.itemsize // width)
    for first in range(start, stop, rows_per_piece):
        rows = range(first, min(first + rows_per_piece, stop))
        begins = [(at + row * row_items + column) % _PERIOD for row in rows]
        piece = np.stack([noise[begin : begin + width] for begin in begins])
        piece *= scale
        target[first - start : rows.stop - start].copy_(torch.from_numpy(piece))


def random_matrix(rows: int, columns: int) -> MatrixSource:
    """A matrix of noise, whole."""
    reads = tuple(whole_placements("weight", (rows, columns), None))
    return MatrixSource(weights=RandomWeights(), reads=reads, rows=rows, columns=columns)
