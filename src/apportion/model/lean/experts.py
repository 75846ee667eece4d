"""A mixture of experts: each expert that any token was routed to computes once, for all its tokens.

Shapes: T = tokens of the batch, H = hidden size, E = experts, A = experts per token, F = the member's FFN columns,
M = tokens of one expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from apportion.model.lean.ops import gated
from apportion.model.reduction import AllReduce
from apportion.model.weights.linear import PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    weight_EH: Tensor
    experts_per_token: int
    normalised: bool
    """Whether the weights of a token's experts sum to 1."""

    def __call__(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of each token's experts: weights_TA and experts_TA."""
        logits_TE = F.linear(x_TH, self.weight_EH)
        weights_TA, experts_TA = logits_TE.softmax(-1, dtype=torch.float32).topk(self.experts_per_token, -1)
        if self.normalised:
            weights_TA /= weights_TA.sum(-1, keepdim=True)
        return weights_TA.to(x_TH.dtype), experts_TA


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    router: Router
    gate_up: list[PackedLinear]
    down: list[PackedLinear]
    activation: Callable[[Tensor], Tensor]
    all_reduce: AllReduce

    def __call__(self, x_TH: Tensor) -> Tensor:
        weights_TA, experts_TA = self.router(x_TH)
        order = experts_TA.flatten().argsort(stable=True)
        rows = order // self.router.experts_per_token
        weights = weights_TA.flatten()[order, None]
        counts = experts_TA.flatten().bincount(minlength=len(self.down)).tolist()
        out_TH = torch.zeros_like(x_TH)
        for expert, (stop, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
            if count:
                own = slice(stop - count, stop)
                gated_MF = gated(self.gate_up[expert](x_TH[rows[own]]), self.activation)
                expert_MH = self.down[expert](gated_MF).mul_(weights[own])
                out_TH.index_add_(0, rows[own], expert_MH)
        return self.all_reduce(out_TH)
