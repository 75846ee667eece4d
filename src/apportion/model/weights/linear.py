"""Matrices of a stage in the weight formats, each with the backend's product for it.

Activations keep their own dtype, and every product rounds as if weights had it too: a row's result does not depend on
the rows beside it, nor, but for the order of sums, on how the matrix is split. docs/benchmarks/linear-formats.md sets
the products beside others.

Shapes: M = rows of activations (tokens), N = output rows, K = input columns.
"""

from torch import Tensor, nn

from apportion.model.weights.formats import WeightFormat
from apportion.model.weights.matrix_source import MatrixSource
from apportion.model.weights.weight_backend import WeightBackend
from apportion.model.weights.weight_memory import Allocate


class PackedLinear(nn.Module):
    """Like nn.Linear, of a matrix that is packed while it is read."""

    def __init__(
        self,
        source: MatrixSource,
        weight_format: WeightFormat,
        backend: WeightBackend,
        bias_N: Tensor | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        """In memory of its own where `allocate` gives none."""
        super().__init__()
        self.in_features, self.out_features = source.columns, source.rows
        self.weights_bytes = weight_format.matrix_bytes(source.rows, source.columns)
        self.bias = bias_N
        self.product = backend.product(source, weight_format, allocate or backend.allocate)

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
