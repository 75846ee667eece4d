"""The formats in which a stage holds its matrices: what they take, and how they are made from a checkpoint.

Shapes: R = rows, K = columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.model.weights.checkpoint import FORMAT_DTYPES
from apportion.model.weights.matrix_source import MatrixSource
from apportion.model.weights.quantise import quantise_rows
from apportion.types.layout import INT8_ROW_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    name: str
    dtype: torch.dtype
    """The dtype of an element."""
    scaled: bool = False
    """Whether every output row has a scale (fp32) beside its elements."""

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix, without what a product adds to fill its vectors."""
        return rows * (columns * self.dtype.itemsize + (INT8_ROW_BYTES if self.scaled else 0))

    def read_into(self, source: MatrixSource, start: int, weight_RK: Tensor, scales_R: Tensor | None) -> None:
        """Fills both with the rows from `start` on; `scales_R` is there where the format is scaled."""
        if scales_R is None:
            source.read_into(weight_RK, start)
        else:
            quantise_rows(source, start, weight_RK, scales_R)


_INT8 = WeightFormat(name="int8", dtype=torch.int8, scaled=True)
WEIGHT_FORMATS = {name: WeightFormat(name=name, dtype=dtype) for name, dtype in FORMAT_DTYPES.items()} | {
    _INT8.name: _INT8
}
"""Every format that a stage can hold its weights in, by name."""
