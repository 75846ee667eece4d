"""Draws the next token of a sequence from its logits, the same wherever and with whomever it is computed."""

import torch
from torch import Tensor

from apportion.types.request import SamplingParams

_POSITIONS_PER_SEED = 2**31
"""Stride between seeds, so that (seed, position) pairs never meet below 2 G positions."""


def sample(logits_V: Tensor, params: SamplingParams, position: int) -> int:
    """The token after `position`: the largest logit, or at `temperature > 0` a draw among the most likely tokens whose
    probabilities reach `top_p` (nucleus sampling, Holtzman et al. 2020)."""
    if params.temperature == 0:
        return int(logits_V.argmax())
    # On the host in fp64, so that a draw does not depend on the device.
    probabilities_V = torch.softmax(logits_V.cpu().double() / params.temperature, dim=-1)
    sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(0) - sorted_V
    kept_V = torch.where(before_V < params.top_p, sorted_V, 0.0)
    generator = torch.Generator().manual_seed((params.seed * _POSITIONS_PER_SEED + position) % 2**63)
    drawn = torch.multinomial(kept_V, 1, generator=generator)
    return int(order_V[drawn])
