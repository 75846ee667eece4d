"""Reads a layer's parameters by transformers' names, several matrices as one product where asked."""

import torch
from torch import Tensor, nn

from apportion.model.linear import PackedLinear
from apportion.model.matrix_source import expert_reads, stacked
from apportion.model.parameters import ParameterReader, parameter_shapes
from apportion.model.shard import Axis, Shape


class LayerReader:
    """Of a layer on the meta device, given its parameters' full shapes and their shapes with each axis shrunk."""

    def __init__(
        self,
        reader: ParameterReader,
        layer: nn.Module,
        index: int,
        full: dict[str, Shape],
        shrunk: dict[Axis, dict[str, Shape]],
    ) -> None:
        self._reader, self._shapes = reader, parameter_shapes(layer)
        prefix = f"model.layers.{index}."
        self._reads = {name: reader.reads(prefix, name, shape, shrunk) for name, shape in full.items()}

    @property
    def kv_heads(self) -> int:
        return self._reader.shares.heads.count

    def vector(self, name: str) -> Tensor:
        return self._reader.read(self._shapes[name], self._reads[name])

    def linear(self, *modules: str) -> PackedLinear:
        """One product for all of `modules`: their outputs side by side."""
        weights = [f"{name}.weight" for name in modules]
        sources = tuple(self._reader.source(self._shapes[name], self._reads[name]) for name in weights)
        biases = [self.vector(f"{name}.bias") for name in modules if f"{name}.bias" in self._shapes]
        return self._reader.linear(stacked(sources), torch.cat(biases) if biases else None)

    def experts(self, name: str) -> list[PackedLinear]:
        """A product for each expert, of a weight [expert, row, column]."""
        num_experts, *shape = self._shapes[name]
        by_expert = (expert_reads(self._reads[name], expert) for expert in range(num_experts))
        sources = [self._reader.source(tuple(shape), reads) for reads in by_expert]
        return [self._reader.linear(source, None) for source in sources]
