"""The table that tokens are looked up in, in the weight formats: int8 rows have a scale each, 16-bit ones are widened.

Shapes: T = tokens, V = the member's vocabulary rows, H = hidden size.
"""

import torch
from torch import Tensor, nn

from apportion.model.weights.formats import WeightFormat
from apportion.model.weights.matrix_source import MatrixSource


class LookupTable(nn.Module):
    """ids_T -> hidden_TH in `torch_dtype`, times `multiplier`."""

    def __init__(
        self,
        source: MatrixSource,
        weight_format: WeightFormat,
        torch_dtype: torch.dtype,
        torch_device: torch.device,
        multiplier: float,
    ) -> None:
        super().__init__()
        shape = source.rows, source.columns
        self.rows_VH = torch.empty(shape, dtype=weight_format.dtype, device=torch_device)
        self.scales_V = torch.empty(source.rows, device=torch_device) if weight_format.scaled else None
        weight_format.read_into(source, 0, self.rows_VH, self.scales_V)
        self._multiplier = torch.tensor(multiplier, dtype=torch_dtype, device=torch_device)
        self.multiplier = multiplier
        self.weights_bytes = weight_format.matrix_bytes(*shape)

    def forward(self, ids_T: Tensor) -> Tensor:
        hidden_TH = self.rows_VH.index_select(0, ids_T).to(self._multiplier.dtype)
        if self.scales_V is not None:
            hidden_TH.mul_(self.scales_V.index_select(0, ids_T)[:, None])
        return hidden_TH.mul_(self._multiplier) if self.multiplier != 1 else hidden_TH
