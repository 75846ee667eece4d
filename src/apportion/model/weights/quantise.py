"""int8 weights: symmetric, one scale per output row. The scale comes from the whole row in the checkpoint, also where
a member of a group holds only some of its columns: the integers do not depend on how the model is split.

Shapes: R = rows, K = columns.
"""

import torch
from torch import Tensor

from apportion.model.weights.matrix_source import MatrixSource

INT8_MAX = 127
READ_ELEMENTS = 2**16
"""Most elements held in fp32 while a matrix is quantised."""


def quantise_rows(source: MatrixSource, start: int, integers_RK: Tensor, scales_R: Tensor) -> None:
    """Fills both with the rows from `start` on."""
    step = max(1, READ_ELEMENTS // source.columns)
    stop = start + len(scales_R)
    for first, weight_RK in source.pieces(start, stop, step, torch.float32, scales_R.device):
        rows = slice(first - start, first - start + len(weight_RK))
        scales_R[rows] = _scales(source.row_peaks(first, first + len(weight_RK), weight_RK))
        integers_RK[rows] = weight_RK.div_(scales_R[rows, None]).round_()


def _scales(peaks_R: Tensor) -> Tensor:
    """From each row's largest magnitude; a row of zeros has the scale 1."""
    return torch.where(peaks_R > 0, peaks_R / INT8_MAX, 1.0)
