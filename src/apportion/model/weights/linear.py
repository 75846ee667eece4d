"""Matrices of a stage in the weight formats, each with the product for it on the device: compiled for a CPU, torch's on
a GPU.

Activations keep their own dtype (fp32 on a CPU), and every product rounds as if weights had it too: a row's result
does not depend on the rows beside it, nor, but for the order of sums, on how the matrix is split.
docs/benchmarks/linear-formats.md sets the products beside others.

Shapes: M = rows of activations (tokens), N = output rows, K = input columns.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apportion.model.kernels.look_up_op import look_up_op
from apportion.model.weights.checkpoint import FORMAT_DTYPES
from apportion.model.weights.cpu_products import ARRAY_TYPES, PackedProduct
from apportion.model.weights.matrix_source import MatrixSource
from apportion.model.weights.quantise import quantise_rows
from apportion.model.weights.random_weights import RandomWeights
from apportion.model.weights.shard import whole_placements
from apportion.model.weights.weight_memory import Allocate, own_memory
from apportion.types.layout import INT8_ROW_BYTES, WIDENED_ELEMENTS

_SIZE = 512
"""Of the matrix to warm up with."""

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
        allocate: Allocate = own_memory,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = source.columns, source.rows
        self.weights_bytes = matrix_bytes(source.rows, source.columns, weight_format)
        self.bias = bias_N
        self.product = make_product(source, weight_format, torch_dtype, torch_device, allocate)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` -> `[..., N]`"""
        if x.numel() == 0:  # a batch that samples nothing
            return x.new_empty(*x.shape[:-1], self.out_features)
        if x.dim() > 2:
            out_MN = self.forward(x.reshape(-1, self.in_features))
            return out_MN.view(*x.shape[:-1], self.out_features)
        out_MN = self.product(x.contiguous())
        if self.bias is not None:
            out_MN += self.bias
        return out_MN


def matrix_bytes(rows: int, columns: int, weight_format: str) -> int:
    """Without what kernels add to fill their vectors."""
    if weight_format == "int8":
        return rows * (columns + INT8_ROW_BYTES)
    return rows * columns * FORMAT_DTYPES[weight_format].itemsize


def make_product(
    source: MatrixSource,
    weight_format: str,
    torch_dtype: torch.dtype,
    torch_device: str,
    allocate: Allocate = own_memory,
) -> Product:
    """Raises ModelError for weights beyond the range of fp16, where a CPU holds them in it."""
    if torch_device == "cpu" and torch_dtype == torch.float32:
        return PackedProduct(source, weight_format, allocate)
    elements = source.rows * source.columns
    if weight_format == "int8":
        weight_NK = allocate(elements, torch_device).view(torch.int8).view(source.rows, source.columns)
        scales_N = allocate(4 * source.rows, torch_device).view(torch.float32)
        quantise_rows(source, 0, weight_NK, scales_N)
        return WidenedProduct(weight_NK, scales_N)
    weight_dtype = FORMAT_DTYPES[weight_format]
    weight_N = allocate(elements * weight_dtype.itemsize, torch_device).view(weight_dtype)
    weight_NK = weight_N.view(source.rows, source.columns)
    source.read_into(weight_NK, 0)
    if weight_NK.dtype == torch_dtype:
        return lambda x_MK: F.linear(x_MK, weight_NK)
    return WidenedProduct(weight_NK, None)


def warm_up(weight_format: str, torch_dtype: torch.dtype, torch_device: str) -> None:
    """Loads what a format's products need, so that its memory is not counted as a stage's."""
    reads = tuple(whole_placements("", (_SIZE, _SIZE), None))
    source = MatrixSource(weights=RandomWeights(), reads=reads, rows=_SIZE, columns=_SIZE)
    linear = PackedLinear(source, weight_format, torch_dtype, torch_device)
    linear(torch.ones(2, _SIZE, dtype=torch_dtype, device=torch_device))
    if torch_device == "cpu" and torch_dtype == torch.float32:
        look_up_op(np.dtype(ARRAY_TYPES[weight_format]))
    small = torch.ones(_SIZE // 2, _SIZE, dtype=torch_dtype, device=torch_device)
    F.linear(small, small)  # of routers and tied heads: the library keeps its buffers


class WidenedProduct:
    """For any device: weights are widened to the activations' dtype, some rows at a time, and then multiplied."""

    def __init__(self, weight_NK: Tensor, scales_N: Tensor | None) -> None:
        self._weight_NK = weight_NK
        self._scales_N = scales_N
        self._step = max(1, WIDENED_ELEMENTS // weight_NK.shape[1])

    def __call__(self, x_MK: Tensor) -> Tensor:
        out_MN = x_MK.new_empty(len(x_MK), len(self._weight_NK))
        for start in range(0, len(self._weight_NK), self._step):
            rows = slice(start, start + self._step)
            out_MN[:, rows] = F.linear(x_MK, self._widened(rows, x_MK.dtype))
        return out_MN

    def _widened(self, rows: slice, torch_dtype: torch.dtype) -> Tensor:
        weight_RK = self._weight_NK[rows].to(torch_dtype)
        return weight_RK if self._scales_N is None else weight_RK.mul_(self._scales_N[rows, None])
