"""Matrices of a stage in the weight formats, each with the fastest product that torch has for it on the device.

Activations keep their own dtype (fp32 on a CPU), and every product rounds as if weights had it too: a row's result
does not depend on the rows beside it, nor, but for the order of sums, on how the matrix is split.
docs/benchmarks/linear-formats.md says how the products were chosen.

Shapes: M = rows of activations (tokens), N = output rows, K = input columns.
"""

import platform
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apportion.model.cpu_products import TILE_ROWS, BlockedProduct, FixedPointProduct, HalfProduct
from apportion.model.matrix_source import MatrixSource
from apportion.model.quantise import quantised_rows
from apportion.model.random_weights import RandomWeights
from apportion.model.shard import whole_placements
from apportion.model.weights import FORMAT_DTYPES
from apportion.types.errors import ModelError
from apportion.types.layout import BLOCKED_FEATURES, INT8_ROW_BYTES, WIDENED_ELEMENTS

PIECE_ELEMENTS = 2**19, 2**22
"""Fewest and most that are packed at once: few, for packing needs them in fp32 too; each piece is a call of its own."""
MOST_PIECES = 8
"""Of a matrix, unless its pieces are the largest."""
ROWS_MULTIPLE = 64
"""Blocks of packed weights have so many rows, or a divisor."""

Product = Callable[[Tensor], Tensor]
"""x_MK -> out_MN"""


class PackedLinear(nn.Module):
    """Like nn.Linear, of a matrix that is packed while it is read. `torch_dtype` is that of the activations."""

    def __init__(
        self,
        source: MatrixSource,
        weight_format: str,
        torch_dtype: torch.dtype,
        torch_device: str,
        bias_N: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = source.columns, source.rows
        self.weights_bytes = matrix_bytes(source.rows, source.columns, weight_format)
        self.bias = bias_N
        self._product = make_product(source, weight_format, torch_dtype, torch_device)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` -> `[..., N]`"""
        if x.numel() == 0:  # a batch that samples nothing
            return x.new_empty(*x.shape[:-1], self.out_features)
        if x.dim() > 2:
            out_MN = self.forward(x.reshape(-1, self.in_features))
            return out_MN.view(*x.shape[:-1], self.out_features)
        out_MN = self._product(x.contiguous())
        if self.bias is not None:
            out_MN += self.bias
        return out_MN


def matrix_bytes(rows: int, columns: int, weight_format: str) -> int:
    """Without what kernels add to fill their blocks."""
    if weight_format == "int8":
        return rows * (columns + INT8_ROW_BYTES)
    return rows * columns * FORMAT_DTYPES[weight_format].itemsize


def make_product(
    source: MatrixSource, weight_format: str, torch_dtype: torch.dtype, torch_device: str
) -> Product:
    """Raises ModelError for weights beyond the range of fp16, where they would have to be held in it."""
    if torch_device == "cpu" and torch_dtype == torch.float32 and _x86():
        if _blocked(source, weight_format):
            return BlockedProduct(_pieces(source, weight_format))
        if weight_format in ("bf16", "fp16"):
            return HalfProduct(_pieces(source, weight_format))
        if _fixed_point(source, weight_format):
            return FixedPointProduct(_int8_pieces(source))
    if weight_format == "int8":
        return WidenedProduct(*quantised_rows(source, 0, source.rows, torch_device))
    weight_NK = source.read(0, source.rows, FORMAT_DTYPES[weight_format], torch_device)
    if weight_NK.dtype == torch_dtype:
        return lambda x_MK: F.linear(x_MK, weight_NK)
    return WidenedProduct(weight_NK, None)


def prepare_product(
    source: MatrixSource, weight_format: str, torch_dtype: torch.dtype, torch_device: str
) -> None:
    """Has a library write its code for matrices of this shape, where it does: megabytes that stay."""
    if torch_device == "cpu" and torch_dtype == torch.float32 and _x86() and _blocked(source, weight_format):
        for rows in {stop - start for start, stop in _row_ranges(source)}:
            BlockedProduct.prepare(rows, source.columns)


def _blocked(source: MatrixSource, weight_format: str) -> bool:
    return weight_format == "fp32" and min(source.rows, source.columns) >= BLOCKED_FEATURES


def _fixed_point(source: MatrixSource, weight_format: str) -> bool:
    return (
        weight_format == "int8"
        and FixedPointProduct.exact()
        and FixedPointProduct.fills_blocks(source.columns)
    )


def warm_up(weight_format: str, torch_dtype: torch.dtype, torch_device: str) -> None:
    """Loads what a format's products need, so that its memory is not counted as a stage's."""
    for columns in (600, 1024):  # some fill blocks, some do not
        reads = tuple(whole_placements("", (64, columns), None))
        source = MatrixSource(weights=RandomWeights(), reads=reads, rows=64, columns=columns)
        linear = PackedLinear(source, weight_format, torch_dtype, torch_device)
        for rows in range(1, TILE_ROWS + 1):
            linear(torch.ones(rows, columns, dtype=torch_dtype, device=torch_device))


def _x86() -> bool:
    return (
        platform.machine() in ("x86_64", "AMD64") and "fbgemm" in torch.backends.quantized.supported_engines
    )


def _row_ranges(source: MatrixSource) -> Iterator[tuple[int, int]]:
    fewest, most = PIECE_ELEMENTS
    elements = min(max(source.rows * source.columns // MOST_PIECES, fewest), most)
    step = max(1, elements // source.columns // ROWS_MULTIPLE) * ROWS_MULTIPLE
    for start in range(0, source.rows, step):
        yield start, min(start + step, source.rows)


def _pieces(source: MatrixSource, weight_format: str) -> Iterator[Tensor]:
    """weight_RK in fp32, rounded to the format."""
    for start, stop in _row_ranges(source):
        weight_RK = source.read(start, stop, torch.float32, "cpu")
        if weight_format != "fp32":
            _check_half_range(source, weight_RK)
        if weight_format == "bf16":
            weight_RK.copy_(weight_RK.bfloat16())
        yield weight_RK


def _check_half_range(source: MatrixSource, weight_RK: Tensor) -> None:
    highest = torch.finfo(torch.float16).max
    peak = float(torch.linalg.vector_norm(weight_RK, torch.inf))
    if not peak <= highest:
        raise ModelError(
            f"tensor '{source.reads[0].source}' has a weight of {peak:.3g}, beyond the range of 16 bits on a CPU"
            f" ({highest:g}); use --weights fp32 or int8"
        )


def _int8_pieces(source: MatrixSource) -> Iterator[tuple[Tensor, Tensor]]:
    for start, stop in _row_ranges(source):
        yield quantised_rows(source, start, stop, "cpu")


class WidenedProduct:
    """For any device: weights are widened to the activations' dtype, some rows at a time, and then multiplied."""

    def __init__(self, weight_NK: Tensor, scales_N: Tensor | None) -> None:
        self._weight_NK = weight_NK
        self._scales_N = scales_N
        self._step = max(1, WIDENED_ELEMENTS[weight_NK.device.type] // weight_NK.shape[1])

    def __call__(self, x_MK: Tensor) -> Tensor:
        out_MN = x_MK.new_empty(len(x_MK), len(self._weight_NK))
        for start in range(0, len(self._weight_NK), self._step):
            rows = slice(start, start + self._step)
            out_MN[:, rows] = F.linear(x_MK, self._widened(rows, x_MK.dtype))
        return out_MN

    def _widened(self, rows: slice, torch_dtype: torch.dtype) -> Tensor:
        weight_RK = self._weight_NK[rows].to(torch_dtype)
        return weight_RK if self._scales_N is None else weight_RK.mul_(self._scales_N[rows, None])
