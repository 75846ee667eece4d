"""Products of fp32 activations with weights of any format, packed for the compiled kernel (`kernels/product`).

Shapes: M = rows of activations, N = output rows, R = some of them, K = input columns.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.model.kernels.op_code import BUFFER_WORDS, ROW_WORDS, ROWS_WORD
from apportion.model.kernels.product import LANES, PANEL_ROWS, product_op
from apportion.model.kernels.team import team_of
from apportion.model.weights.formats import WeightFormat
from apportion.model.weights.matrix_source import MatrixSource
from apportion.model.weights.weight_memory import Allocate
from apportion.types.errors import ModelError

_READ_ELEMENTS = 2**16
"""Read and packed at once."""
_SHARED_MULTIPLICATIONS = 2**19
"""Fewer are done before another thread has begun."""
_ARRAY_TYPES = {
    torch.float32: np.float32,
    torch.float16: np.int16,
    torch.bfloat16: np.uint16,
    torch.int8: np.int8,
}
"""numba knows no 16-bit floats: what stands for them."""
_FP16_EXPONENT = np.int16(0x7C00)
"""All its bits are set in what is infinite or not a number."""
_NO_SCALES = np.empty(0, np.float32)


def array_type(weight_format: WeightFormat) -> "np.dtype[Any]":
    """An element as compiled code sees it."""
    return np.dtype(_ARRAY_TYPES[weight_format.dtype])


class PackedProduct:
    """x_MK -> out_MN, rounded as with fp32 weights."""

    def __init__(self, source: MatrixSource, weight_format: WeightFormat, allocate: Allocate) -> None:
        """Raises ModelError for weights beyond the range of fp16, where they are held in it."""
        self.rows, self.columns = source.rows, source.columns
        filled_rows = -(-source.rows // LANES) * LANES
        elements = array_type(weight_format)
        self._weights = allocate(filled_rows * self.columns * elements.itemsize).numpy().view(elements)
        self._scales_N = _NO_SCALES
        if weight_format.scaled:
            self._scales_N = allocate(4 * filled_rows).numpy().view(np.float32)
            self._scales_N.fill(1)
        self.op = product_op(self._weights.dtype)
        self._team = team_of(torch.get_num_threads())
        self._row_1W = np.zeros((1, ROW_WORDS), np.int64)
        self.op.fill(self._row_1W[0], **self.operands)
        step = max(1, _READ_ELEMENTS // self.columns // PANEL_ROWS) * PANEL_ROWS
        # One piece of memory for all: what is freed between weights that stay is hardly ever used again.
        piece_RK = torch.empty(min(step, source.rows), self.columns, dtype=weight_format.dtype)
        for start in range(0, source.rows, step):
            weight_RK = piece_RK[: source.rows - start]
            scales_R = None
            if weight_format.scaled:
                scales_R = torch.from_numpy(self._scales_N[start : start + len(weight_RK)])
            weight_format.read_into(source, start, weight_RK, scales_R)
            self._pack(self._as_held(weight_RK, source, start), start)

    @property
    def operands(self) -> dict[str, int]:
        return {
            "weights": self._weights.ctypes.data,
            "scales": self._scales_N.ctypes.data,
            "columns": self.columns,
            "width": self.rows,
        }

    def __call__(self, x_MK: Tensor) -> Tensor:
        out_MN = torch.empty(len(x_MK), self.rows)
        row_W = self._row_1W[0]
        row_W[ROWS_WORD], row_W[BUFFER_WORDS] = len(x_MK), (x_MK.data_ptr(), 0, 0, out_MN.data_ptr())
        few = len(x_MK) * self._weights.size < _SHARED_MULTIPLICATIONS
        (team_of(1) if few else self._team).run_ops(self._row_1W, 0, 1)
        return out_MN

    def _as_held(self, weight_RK: Tensor, source: MatrixSource, start: int) -> np.ndarray:
        """The rows from `start` on, of which compiled code sees the bits."""
        if weight_RK.dtype in (torch.float32, torch.int8):
            return weight_RK.numpy()
        bits_RK = weight_RK.view(torch.int16).numpy()
        if weight_RK.dtype == torch.float16 and ((bits_RK & _FP16_EXPONENT) == _FP16_EXPONENT).any():
            raise _beyond_fp16(source, start, start + len(weight_RK))
        return bits_RK.view(self._weights.dtype)

    def _pack(self, weight_RK: np.ndarray, start: int) -> None:
        """Panel by panel, from row `start` on."""
        columns = weight_RK.shape[1]
        filled_rows = len(self._weights) // columns
        for first in range(0, len(weight_RK), PANEL_ROWS):
            rows_RK = weight_RK[first : first + PANEL_ROWS]
            width = min(PANEL_ROWS, filled_rows - start - first)
            at = (start + first) * columns
            panel_KW = self._weights[at : at + width * columns].reshape(columns, width)
            panel_KW[:, : len(rows_RK)] = rows_RK.T
            panel_KW[:, len(rows_RK) :] = 0


def _beyond_fp16(source: MatrixSource, start: int, stop: int) -> ModelError:
    weight_RK = torch.empty(stop - start, source.columns)
    source.read_into(weight_RK, start)
    peak = float(torch.linalg.vector_norm(weight_RK, torch.inf))
    highest = torch.finfo(torch.float16).max
    return ModelError(
        f"tensor '{source.reads[0].source}' has a weight of {peak:.3g}, beyond the range of fp16 ({highest:g});"
        " use --weights bf16, fp32 or int8"
    )
