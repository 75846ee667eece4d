"""Packed experts, where transformers' layers expect one weight of all experts: `F.linear(x, weight[expert])`."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from apportion.model.weights.linear import PackedLinear


class ExpertMatrices:
    """Stands for a weight `[expert, rows, columns]`."""

    def __init__(self, experts: Sequence[PackedLinear]) -> None:
        self._experts = [_ExpertMatrix(expert) for expert in experts]

    def __getitem__(self, expert: Tensor) -> "_ExpertMatrix":
        return self._experts[int(expert)]


class _ExpertMatrix:
    """Stands for one expert's weight as the second argument of F.linear."""

    def __init__(self, linear: PackedLinear) -> None:
        self.linear = linear

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Tensor],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        assert function is F.linear
        x, matrix = args
        return matrix.linear(x)
