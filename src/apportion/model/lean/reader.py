"""Reads the member's part of a layer's parameters by transformers' names, several matrices as one product where asked.

What is cut is cut along a `Share`: of query and key-value heads, or of FFN columns.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from apportion.model.weights.linear import PackedLinear
from apportion.model.weights.matrix_source import expert_reads, stacked
from apportion.model.weights.parameters import ParameterReader, Reads
from apportion.model.weights.shard import Shape, ShardedDim, Share


class LayerReader:
    def __init__(self, reader: ParameterReader, layer: int) -> None:
        self._reader = reader
        self._prefix = f"model.layers.{layer}."

    def replicated(self, name: str, *shape: int) -> Tensor:
        return self._reader.read(*self._part(name, shape, None))

    def column_parallel(
        self, rows: Mapping[str, int], columns: int, share: Share, *, biased: bool
    ) -> PackedLinear:
        """One product for all modules in `rows`, which says how many each has: their outputs side by side."""
        cuts = {name: ShardedDim(dim=0, segments=(size,), share=share) for name, size in rows.items()}
        parts = [self._part(f"{name}.weight", (rows[name], columns), cut) for name, cut in cuts.items()]
        biases = [self._part(f"{name}.bias", (rows[name],), cut) for name, cut in cuts.items() if biased]
        source = stacked(tuple(self._reader.source(*part) for part in parts))
        return self._reader.linear(
            source, torch.cat([self._reader.read(*bias) for bias in biases]) if biased else None
        )

    def row_parallel(self, name: str, rows: int, columns: int, share: Share, *, biased: bool) -> PackedLinear:
        """A product whose inputs are cut, so that its results are partial."""
        cut = ShardedDim(dim=1, segments=(columns,), share=share)
        source = self._reader.source(*self._part(f"{name}.weight", (rows, columns), cut))
        return self._reader.linear(source, self.replicated(f"{name}.bias", rows) if biased else None)

    def experts(self, name: str, full: Shape, cut: ShardedDim) -> list[PackedLinear]:
        """A product for each expert, of a weight [expert, row, column]."""
        (num_experts, *shape), reads = self._part(name, full, cut)
        by_expert = (expert_reads(reads, expert) for expert in range(num_experts))
        return [self._reader.linear(self._reader.source(tuple(shape), one), None) for one in by_expert]

    def _part(self, name: str, full: Shape, cut: ShardedDim | None) -> tuple[Shape, Reads]:
        """The member's shape of a parameter whose whole shape is `full`, and where it lies."""
        return cut.local_shape(full) if cut else full, self._reader.placed(self._prefix, name, full, cut)
