"""Products of fp32 activations with weights of any format on a CPU, packed for the compiled kernel (`kernels/product`).

Shapes: M = rows of activations, N = output rows, R = some of them, K = input columns.
"""

import numpy as np
import torch
from torch import Tensor

from apportion.model.kernels.op_code import BUFFER_WORDS, ROW_WORDS, ROWS_WORD
from apportion.model.kernels.product import LANES, PANEL_ROWS, product_op
from apportion.model.kernels.team import team_of
from apportion.model.weights.checkpoint import FORMAT_DTYPES
from apportion.model.weights.matrix_source import MatrixSource
from apportion.model.weights.quantise import quantised_rows
from apportion.model.weights.weight_memory import Allocate, own_memory
from apportion.types.errors import ModelError

_READ_ELEMENTS = 2**16
"""Read and packed at once."""
_SHARED_MULTIPLICATIONS = 2**19
"""Fewer are done before another thread has begun."""
ARRAY_TYPES = {"fp32": np.float32, "fp16": np.int16, "bf16": np.uint16, "int8": np.int8}
"""numba knows no 16-bit floats: what stands for them."""
_FP16_EXPONENT = np.int16(0x7C00)
"""All its bits are set in what is infinite or not a number."""
_NO_SCALES = np.empty(0, np.float32)


class PackedProduct:
    """x_MK -> out_MN, rounded as with fp32 weights."""

    def __init__(self, source: MatrixSource, weight_format: str, allocate: Allocate = own_memory) -> None:
        """Raises ModelError for weights beyond the range of fp16, where they are held in it."""
        self.rows, self.columns = source.rows, source.columns
        filled_rows = -(-source.rows // LANES) * LANES
        array_type = np.dtype(ARRAY_TYPES[weight_format])
        self._weights = (
            allocate(filled_rows * self.columns * array_type.itemsize, "cpu").numpy().view(array_type)
        )
        self._scales_N = _NO_SCALES
        if weight_format == "int8":
            self._scales_N = allocate(4 * filled_rows, "cpu").numpy().view(np.float32)
            self._scales_N.fill(1)
        self.op = product_op(self._weights.dtype)
        self._team = team_of(torch.get_num_threads())
        self._row_1W = np.zeros((1, ROW_WORDS), np.int64)
        self.op.fill(self._row_1W[0], **self.operands)
        step = max(1, _READ_ELEMENTS // self.columns // PANEL_ROWS) * PANEL_ROWS
        if weight_format == "int8":
            for start in range(0, source.rows, step):
                self._pack(self._quantised(source, start, min(start + step, source.rows)), start)
            return
        for start, weight_RK in source.pieces(0, source.rows, step, FORMAT_DTYPES[weight_format], "cpu"):
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

    def _quantised(self, source: MatrixSource, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)`: integers_RK."""
        integers_RK, scales_R = quantised_rows(source, start, stop, "cpu")
        self._scales_N[start:stop] = scales_R.numpy()
        return integers_RK.numpy()

    def _as_held(self, weight_RK: Tensor, source: MatrixSource, start: int) -> np.ndarray:
        """The rows from `start` on, of which compiled code sees the bits."""
        if weight_RK.dtype == torch.float32:
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
    peak = float(torch.linalg.vector_norm(source.read(start, stop, torch.float32, "cpu"), torch.inf))
    highest = torch.finfo(torch.float16).max
    return ModelError(
        f"tensor '{source.reads[0].source}' has a weight of {peak:.3g}, beyond the range of fp16 ({highest:g});"
        " use --weights bf16, fp32 or int8"
    )
