"""Rotary position embeddings: the frequencies of a `RopeConfig`, and cos and sin at positions.

Formulas as in transformers' `modeling_rope_utils`, in fp32 and the same order.

Shapes: T = tokens of the batch, D = head dim, F = D / 2 frequencies.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from apportion.model.rope_config import Llama3Scaling, RopeConfig, YarnScaling

Rotary = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]
"""positions_T -> cos_1TD, sin_1TD"""


class Rope:
    def __init__(self, config: RopeConfig, head_dim: int, torch_device: torch.device) -> None:
        self.frequencies_F = _frequencies(config, head_dim).to(torch_device)
        self.amplitude = config.scaling.amplitude if isinstance(config.scaling, YarnScaling) else 1.0

    def __call__(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos_1TD and sin_1TD, whose second halves repeat the first."""
        angles_TF = positions_T[:, None].float() * self.frequencies_F
        angles_1TD = torch.cat((angles_TF, angles_TF), -1)[None]
        return (angles_1TD.cos() * self.amplitude).to(dtype), (angles_1TD.sin() * self.amplitude).to(dtype)


def _frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    wavelengths_F = config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)
    match config.scaling:
        case Llama3Scaling():
            return _llama3(1 / wavelengths_F, config.factor, config.scaling)
        case YarnScaling():
            return _yarn(wavelengths_F, config, config.scaling)
        case None:
            return 1 / wavelengths_F / config.factor


def _llama3(frequencies_F: Tensor, factor: float, scaling: Llama3Scaling) -> Tensor:
    wavelengths_F = 2 * math.pi / frequencies_F
    longest_kept, shortest_stretched = (scaling.original_tokens / one for one in (scaling.high, scaling.low))
    stretched_F = torch.where(wavelengths_F > shortest_stretched, frequencies_F / factor, frequencies_F)
    kept = (scaling.original_tokens / wavelengths_F - scaling.low) / (scaling.high - scaling.low)
    between_F = (1 - kept) * stretched_F / factor + kept * stretched_F
    is_between_F = (wavelengths_F >= longest_kept) & (wavelengths_F <= shortest_stretched)
    return torch.where(is_between_F, between_F, stretched_F)


def _yarn(wavelengths_F: Tensor, config: RopeConfig, scaling: YarnScaling) -> Tensor:
    num_dims = 2 * len(wavelengths_F)
    low, high = (
        num_dims * math.log(scaling.original_tokens / (turns * 2 * math.pi)) / (2 * math.log(config.theta))
        for turns in (scaling.fast, scaling.slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, num_dims - 1)
    high += 0.001 * (low == high)
    ramp_F = ((torch.arange(len(wavelengths_F), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept_F = 1 - ramp_F
    return 1 / (config.factor * wavelengths_F) * (1 - kept_F) + 1 / wavelengths_F * kept_F
