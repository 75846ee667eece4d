"""A member's part of a matrix as the checkpoint keeps it, read some rows at a time.

Shapes: R = some of the member's rows, K = its columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apportion.model.weights.checkpoint import Weights
from apportion.model.weights.shard import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixSource:
    """`reads` fill the rows in order, or all rows of some columns each."""

    weights: Weights
    reads: tuple[Placement, ...]
    rows: int
    columns: int

    def pieces(
        self, start: int, stop: int, step: int, dtype: torch.dtype, torch_device: torch.device
    ) -> Iterator[tuple[int, Tensor]]:
        """Rows `[start, stop)`, up to `step` at once: the first one's number, and weight_RK until the next."""
        # One piece of memory for all: what is freed between weights that stay is hardly ever used again.
        most = min(step, stop - start)
        piece_RK = torch.empty(most, self.columns, dtype=dtype, device=torch_device)
        for first in range(start, stop, step):
            weight_RK = piece_RK[: stop - first]
            self.read_into(weight_RK, first)
            yield first, weight_RK

    def read_into(self, weight_RK: Tensor, start: int) -> None:
        """Rows from `start` on, as many as `weight_RK` has."""
        for read, first, last, source_first in self._within(start, start + len(weight_RK)):
            source_rows = (source_first, source_first + last - first)
            columns = read.target[1] if len(read.target) > 1 else slice(None)
            target = weight_RK[first - start : last - start, columns]
            self.weights.check_shape(read.source, read.source_shape)
            self.weights.read_into(target, read.source, (source_rows, read.ranges[1]))

    def row_peaks(self, start: int, stop: int, weight_RK: Tensor) -> Tensor:
        """Largest magnitude of each of the rows `[start, stop)`, which are `weight_RK`, over all of the checkpoint's
        columns: peaks_R."""
        peaks_R = torch.linalg.vector_norm(weight_RK, torch.inf, 1)
        for read, first, last, source_first in self._within(start, stop):
            if read.ranges[1] != (0, read.source_shape[1]):
                whole = self.weights.row_peaks(read.source, source_first, source_first + last - first)
                peaks_R[first - start : last - start] = whole.to(peaks_R.device)
        return peaks_R

    def _within(self, start: int, stop: int) -> Iterator[tuple[Placement, int, int, int]]:
        """Each read that has a part in the rows: its rows `[first, last)`, and the first one's row in its source."""
        for read in self.reads:
            rows = read.target[0] if read.target else slice(None)
            assert isinstance(rows, slice)
            begin, end, _ = rows.indices(self.rows)
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield read, first, last, read.ranges[0][0] + first - begin


def expert_reads(reads: tuple[Placement, ...], expert: int) -> tuple[Placement, ...]:
    """Those of a weight [expert, row, column] that fill one expert's matrix."""
    return tuple(
        replace(read, target=read.target[1:]) for read in reads if read.target and read.target[0] == expert
    )


def stacked(sources: tuple[MatrixSource, ...]) -> MatrixSource:
    """The rows of one matrix after those of another, of as many columns."""
    reads: list[Placement] = []
    rows = 0
    for source in sources:
        reads += [_moved(read, rows, source.rows) for read in source.reads]
        rows += source.rows
    return MatrixSource(weights=sources[0].weights, reads=tuple(reads), rows=rows, columns=sources[0].columns)


def _moved(read: Placement, by_rows: int, rows: int) -> Placement:
    target = read.target[0] if read.target else slice(None)
    assert isinstance(target, slice)
    start, stop, _ = target.indices(rows)
    return replace(read, target=(slice(start + by_rows, stop + by_rows), *read.target[1:]))
