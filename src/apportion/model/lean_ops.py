"""What a lean layer does between its products: compiled (`lean_kernels`) in fp32 on a CPU, by torch elsewhere.

Shapes: T = tokens of the batch, H = hidden size, D = head dim; the member's: N = query heads, K = KV heads,
W = N + 2·K, F = FFN columns, G = 2·F.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from apportion.model import lean_kernels
from apportion.model.lean_config import Activation

_NO_WEIGHT = np.empty(0, np.float32)
_TANH_LINEAR = 2 * math.sqrt(2 / math.pi)
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}
_COMPILED_ACTIVATIONS = {
    ACTIVATIONS["silu"]: (1.0, 0.0),
    ACTIVATIONS["gelu_pytorch_tanh"]: (_TANH_LINEAR, 0.044715 * _TANH_LINEAR),
}
"""The activations x · sigmoid(a·x + b·x³), and their a and b."""


def _compiled(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMS norm."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        if _compiled(x):
            return self._written(x, torch.empty(x.shape))
        wide = F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return wide.to(x.dtype)

    def in_place(self, x_TH: Tensor) -> Tensor:
        return self._written(x_TH, x_TH) if _compiled(x_TH) else self(x_TH)

    def _written(self, x_TH: Tensor, out_TH: Tensor) -> Tensor:
        lean_kernels.norm(x_TH.numpy(), self.weight.numpy(), self.eps, out_TH.numpy())
        return out_TH

    def of_sum(self, x_TH: Tensor, sum_TH: Tensor) -> Tensor:
        """Adds x to `sum_TH` in place; returns the sum's norm."""
        if not _compiled(x_TH):
            return self(sum_TH.add_(x_TH))
        out_TH = torch.empty(sum_TH.shape)
        lean_kernels.add_norm(x_TH.numpy(), sum_TH.numpy(), self.weight.numpy(), self.eps, out_TH.numpy())
        return out_TH


def split_heads(
    projected_TWD: Tensor, kv_heads: int, rotation: tuple[Tensor, Tensor], norms: tuple[Norm, Norm] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """query_TND and key_TKD, normed and rotated, and value_TKD. `projected_TWD` is scratch afterwards."""
    if _compiled(projected_TWD):
        return _split_heads_compiled(projected_TWD, kv_heads, rotation, norms)
    query_TND, key_TKD = projected_TWD[:, : -2 * kv_heads], projected_TWD[:, -2 * kv_heads : -kv_heads]
    if norms is not None:
        query_TND, key_TKD = norms[0](query_TND), norms[1](key_TKD)
    return _rotated(query_TND, rotation), _rotated(key_TKD, rotation), projected_TWD[:, -kv_heads:]


def _split_heads_compiled(
    projected_TWD: Tensor, kv_heads: int, rotation: tuple[Tensor, Tensor], norms: tuple[Norm, Norm] | None
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, head_dim = projected_TWD.shape
    query_TND = torch.empty(tokens, heads - 2 * kv_heads, head_dim)
    key_TKD, value_TKD = torch.empty(tokens, kv_heads, head_dim), torch.empty(tokens, kv_heads, head_dim)
    lean_kernels.split(
        projected_TWD.numpy(),
        *(part_1TD.numpy()[0] for part_1TD in rotation),
        *((_NO_WEIGHT, _NO_WEIGHT) if norms is None else (norm.weight.numpy() for norm in norms)),
        0.0 if norms is None else norms[0].eps,
        *(query_TND.numpy(), key_TKD.numpy(), value_TKD.numpy()),
    )
    return query_TND, key_TKD, value_TKD


def _rotated(x_TND: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos_T1D, sin_T1D = (part_1TD[0, :, None] for part_1TD in rotation)
    half = x_TND.shape[-1] // 2
    turned_TND = torch.cat((-x_TND[..., half:], x_TND[..., :half]), -1)
    return (x_TND * cos_T1D).addcmul_(turned_TND, sin_T1D)


def gated(gate_up_TG: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) · up: out_TF"""
    coefficients = _COMPILED_ACTIVATIONS.get(activation)
    if coefficients is None or not _compiled(gate_up_TG):
        gate_TF, up_TF = gate_up_TG.chunk(2, -1)
        return activation(gate_TF).mul_(up_TF)
    tokens, columns = gate_up_TG.shape
    out_TF = torch.empty(tokens, columns // 2)
    lean_kernels.gate(gate_up_TG.numpy(), *coefficients, out_TF.numpy())
    return out_TF
