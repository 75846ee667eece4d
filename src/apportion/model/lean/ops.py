"""What a lean layer does between its products where it is not compiled (`kernels/layer`).

Shapes: T = tokens of the batch, H = hidden size, D = head dim; the member's: N = query heads, K = KV heads,
W = N + 2·K, F = FFN columns, G = 2·F.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from apportion.model.lean.config import Activation

Activate = Callable[[Tensor], Tensor]
_TANH_LINEAR = 2 * math.sqrt(2 / math.pi)
ACTIVATIONS: dict[Activation, Activate] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}
_COMPILED_ACTIVATIONS = {
    ACTIVATIONS["silu"]: (1.0, 0.0),
    ACTIVATIONS["gelu_pytorch_tanh"]: (_TANH_LINEAR, 0.044715 * _TANH_LINEAR),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMS norm over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


def split_heads(
    projected_TWD: Tensor, kv_heads: int, rotation: tuple[Tensor, Tensor], norms: tuple[Norm, Norm] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """query_TND and key_TKD, normed and rotated, and value_TKD."""
    query_TND, key_TKD = projected_TWD[:, : -2 * kv_heads], projected_TWD[:, -2 * kv_heads : -kv_heads]
    if norms is not None:
        query_TND, key_TKD = norms[0](query_TND), norms[1](key_TKD)
    return _rotated(query_TND, rotation), _rotated(key_TKD, rotation), projected_TWD[:, -kv_heads:]


def _rotated(x_TND: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos_T1D, sin_T1D = (part_1TD[0, :, None] for part_1TD in rotation)
    half = x_TND.shape[-1] // 2
    turned_TND = torch.cat((-x_TND[..., half:], x_TND[..., :half]), -1)
    return (x_TND * cos_T1D).addcmul_(turned_TND, sin_T1D)


def gate_coefficients(activation: Activate) -> tuple[float, float] | None:
    """a and b of an activation x · sigmoid(a·x + b·x³)."""
    return _COMPILED_ACTIVATIONS.get(activation)


def gated(gate_up_TG: Tensor, activation: Activate) -> Tensor:
    """activation(gate) · up: out_TF"""
    gate_TF, up_TF = gate_up_TG.chunk(2, -1)
    return activation(gate_TF).mul_(up_TF)
