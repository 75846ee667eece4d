"""The modules a tensor-parallel group puts in place of transformers' own: they reduce over the members.

Shapes: T = tokens, H = hidden size; the member's: I = input columns, V = vocabulary rows, W = norm weights.
"""

import torch
from torch import Tensor, nn

from apportion.model.reduction import AllReduce
from apportion.model.weights.linear import PackedLinear
from apportion.model.weights.shard import Share
from apportion.model.weights.vocabulary import LookupTable


class RowParallelLinear(nn.Module):
    """A projection whose input is sharded: partial sums are reduced, then the bias is added once."""

    def __init__(self, linear: PackedLinear | nn.Linear, all_reduce: AllReduce) -> None:
        super().__init__()
        self.bias_H = linear.bias
        setattr(linear, "bias", None)  # noqa: B010, which a linear module's type does not allow
        self.linear = linear
        self.all_reduce = all_reduce

    def forward(self, input_1TI: Tensor) -> Tensor:
        out_TH = self.all_reduce(self.linear(input_1TI[0]))
        return (out_TH if self.bias_H is None else out_TH + self.bias_H)[None]


class VocabParallelEmbedding(nn.Module):
    """An embedding of the ids that are the member's share: others give zeros, and the members' are summed."""

    def __init__(self, table: LookupTable, vocab: Share, all_reduce: AllReduce) -> None:
        super().__init__()
        self.table = table
        self.vocab = vocab
        self.all_reduce = all_reduce

    def forward(self, ids_T: Tensor) -> Tensor:
        if self.vocab.count == self.vocab.units:
            return self.all_reduce(self.table(ids_T))
        local_T = ids_T - self.vocab.start
        elsewhere_T = (local_T < 0) | (local_T >= self.vocab.count)
        hidden_TH = self.table(local_T.clamp_(0, self.vocab.count - 1))
        return self.all_reduce(hidden_TH.masked_fill_(elsewhere_T[:, None], 0))


class WideRMSNorm(nn.Module):
    """RMS norm over all heads (olmo2), of which the member holds some: the squares are summed."""

    def __init__(self, weight_W: Tensor, eps: float, full_width: int, all_reduce: AllReduce) -> None:
        super().__init__()
        self.weight_W = weight_W
        self.eps = eps
        self.full_width = full_width
        self.all_reduce = all_reduce

    def forward(self, x_1TW: Tensor) -> Tensor:
        wide_TW = x_1TW[0].float()
        squares_T1 = self.all_reduce(wide_TW.square().sum(-1, keepdim=True))
        scale_T1 = torch.rsqrt(squares_T1 / self.full_width + self.eps)
        return (self.weight_W * (wide_TW * scale_T1)).to(x_1TW.dtype)[None]
