"""What reading weights asks of the backend: where tensors lie, memory for matrices, and products of them."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from apportion.model.weights.formats import WeightFormat
from apportion.model.weights.matrix_source import MatrixSource
from apportion.model.weights.weight_memory import Allocate

Product = Callable[[Tensor], Tensor]
"""x_MK -> out_MN, of M rows of activations (tokens), K input columns and N output rows."""


class WeightBackend(Protocol):
    @property
    def torch_device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype, which is also that of norms, biases and routers."""
        ...

    def allocate(self, num_bytes: int) -> Tensor:
        """Memory of its own for a matrix: a tensor of uint8 on the device."""
        ...

    def product(self, source: MatrixSource, weight_format: WeightFormat, allocate: Allocate) -> Product:
        """The product of activations with the matrix, which is held in the format, in what `allocate` gives.

        A row's result does not depend on the rows beside it. Raises ModelError for weights beyond the format's range.
        """
        ...
