"""The table that tokens are looked up in, in the weight formats: int8 rows have a scale each, 16-bit ones are widened.

Shapes: T = tokens, V = the member's vocabulary rows, H = hidden size.
"""

import numpy as np
import torch
from torch import Tensor, nn

from apportion.model.kernels.kv_elements import ELEMENT_TYPES
from apportion.model.weights.checkpoint import FORMAT_DTYPES
from apportion.model.weights.matrix_source import MatrixSource
from apportion.model.weights.quantise import quantised_rows


class LookupTable(nn.Module):
    """ids_T -> hidden_TH in `torch_dtype`, times `multiplier`."""

    def __init__(
        self,
        source: MatrixSource,
        weight_format: str,
        torch_dtype: torch.dtype,
        torch_device: str,
        multiplier: float,
    ) -> None:
        super().__init__()
        self.scales_V: Tensor | None = None
        if weight_format == "int8":
            self.rows_VH, self.scales_V = quantised_rows(source, 0, source.rows, torch_device)
        else:
            self.rows_VH = source.read(0, source.rows, FORMAT_DTYPES[weight_format], torch_device)
        self._multiplier = torch.tensor(multiplier, dtype=torch_dtype, device=torch_device)
        self.multiplier = multiplier
        self.weights_bytes = self.rows_VH.nbytes
        if self.scales_V is not None:
            self.weights_bytes += self.scales_V.nbytes

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows and scales, as compiled code sees them, on a CPU."""
        rows_VH = self.rows_VH
        if rows_VH.dtype != torch.int8:
            rows_VH = rows_VH.view(ELEMENT_TYPES[rows_VH.dtype])
        return rows_VH.numpy(), None if self.scales_V is None else self.scales_V.numpy()

    def forward(self, ids_T: Tensor) -> Tensor:
        hidden_TH = self.rows_VH.index_select(0, ids_T).to(self._multiplier.dtype)
        if self.scales_V is not None:
            hidden_TH.mul_(self.scales_V.index_select(0, ids_T)[:, None])
        return hidden_TH.mul_(self._multiplier) if self.multiplier != 1 else hidden_TH
