"""Draws the next tokens of sequences from their logits, the same wherever and with whomever they are computed."""

from collections.abc import Sequence
from hashlib import blake2b
from math import isfinite

import torch
from torch import Tensor

from apportion.types.request import Draw, SamplingParams


class NotFiniteError(ArithmeticError):
    """Logits are NaN or infinite: nothing can be drawn by them."""


def sample(logits_NV: Tensor, draws: Sequence[tuple[int, Draw, int]]) -> list[int]:
    """The token after `position`, for each draw as (row, draw, position).

    The largest logit, or at `temperature > 0` a draw among the most likely tokens whose probabilities reach `top_p`
    (nucleus sampling, Holtzman et al. 2020). Raises NotFiniteError.
    """
    largest_N, likeliest_N = (part_N.tolist() for part_N in logits_NV.max(dim=-1))
    if not all(isfinite(largest_N[row]) for row, _, _ in draws):  # NaN is larger than all
        raise NotFiniteError
    return [
        likeliest_N[row]
        if draw.sampling.temperature == 0
        else _sample_row(logits_NV[row], draw.sampling, position)
        for row, draw, position in draws
    ]


def _sample_row(logits_V: Tensor, params: SamplingParams, position: int) -> int:
    # On the host in fp64, so that a draw does not depend on the device; in place, as the vocabulary may be large.
    scaled_V = logits_V.cpu().double()
    scaled_V.sub_(scaled_V.max()).div_(params.temperature)  # none overflows at any temperature
    probabilities_V = torch.softmax(scaled_V, dim=-1, out=scaled_V)
    sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
    before_V = torch.cumsum(sorted_V, 0, out=probabilities_V).sub_(sorted_V)
    kept_V = sorted_V.masked_fill_(before_V >= params.top_p, 0.0)
    generator = torch.Generator().manual_seed(_draw_seed(params.seed, position))
    drawn = torch.multinomial(kept_V, 1, generator=generator)
    return int(order_V[drawn])


def _draw_seed(seed: int, position: int) -> int:
    """Mixed into 32 bits, as torch's generator on a CPU looks at no more of what it is given."""
    digest = blake2b(f"{seed} {position}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
