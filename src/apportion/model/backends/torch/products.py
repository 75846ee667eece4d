"""Products by torch's own operations, on any device.

Shapes: M = rows of activations (tokens), N = output rows, R = some of them, K = input columns.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from apportion.types.layout import WIDENED_ELEMENTS


class PlainProduct:
    """Weights have the activations' dtype."""

    def __init__(self, weight_NK: Tensor) -> None:
        self._weight_NK = weight_NK

    def __call__(self, x_MK: Tensor) -> Tensor:
        return F.linear(x_MK, self._weight_NK)


class WidenedProduct:
    """Weights are widened to the activations' dtype, some rows at a time, and then multiplied."""

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
