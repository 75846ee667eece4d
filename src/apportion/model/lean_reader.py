"""Reads a layer's parameters by transformers' names, several matrices as one product where asked."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from apportion.model.linear import PackedLinear
from apportion.model.matrix_source import MatrixSource, expert_reads, stacked
from apportion.model.parameters import parameter_shapes
from apportion.model.shard import Axis, Placement, RankShares, Shape, placements, sharded_dim
from apportion.model.weights import FORMAT_DTYPES, Weights
from apportion.types.model import ModelSpec
from apportion.types.plan import Stage


class LeanReader:
    """Reads a member's part; `observe_memory` is called after each product or vector."""

    def __init__(
        self,
        weights: Weights,
        model: ModelSpec,
        stage: Stage,
        shares: RankShares,
        torch_device: str,
        observe_memory: Callable[[], None],
    ) -> None:
        self.shares = shares
        self.parameters = self.weights_bytes = 0
        self._weights, self._model = weights, model
        self._format, self._dtype = stage.weight_format, FORMAT_DTYPES[stage.activation_format]
        self._torch_device = torch_device
        self._observe_memory = observe_memory

    def layer(
        self, layer: nn.Module, index: int, full: dict[str, Shape], shrunk: dict[Axis, dict[str, Shape]]
    ) -> "LayerReader":
        """Of a layer on the meta device, given its parameters' full shapes and their shapes with each axis shrunk."""
        reads: dict[str, tuple[Placement, ...]] = {}
        for name, shape in full.items():
            shrunk_shapes: dict[Axis, Shape] = {axis: shapes[name] for axis, shapes in shrunk.items()}
            sharded = sharded_dim(name, shape, shrunk_shapes, self._model, self.shares)
            prefix = f"model.layers.{index}."
            reads[name] = tuple(placements(prefix, name, self._model.family, self._weights, shape, sharded))
        return LayerReader(self, parameter_shapes(layer), reads)

    def tensor(self, shape: Shape, reads: tuple[Placement, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._torch_device)
        for read in reads:
            self._weights.check_shape(read.source, read.source_shape)
            self._weights.read_into(tensor[read.target], read.source, read.ranges)
        self._count(tensor.numel(), tensor.nbytes)
        return tensor

    def source(self, shape: Shape, reads: tuple[Placement, ...]) -> MatrixSource:
        rows, columns = shape
        return MatrixSource(weights=self._weights, reads=reads, rows=rows, columns=columns)

    def linear(self, source: MatrixSource, bias_N: Tensor | None) -> PackedLinear:
        linear = PackedLinear(source, self._format, self._dtype, self._torch_device, bias_N)
        self._count(source.rows * source.columns, linear.weights_bytes)
        return linear

    def _count(self, parameters: int, weights_bytes: int) -> None:
        self.parameters += parameters
        self.weights_bytes += weights_bytes
        self._observe_memory()


class LayerReader:
    """Of one layer; `shapes` are those of the member's part of each parameter."""

    def __init__(
        self, reader: LeanReader, shapes: dict[str, Shape], reads: dict[str, tuple[Placement, ...]]
    ) -> None:
        self._reader, self._shapes, self._reads = reader, shapes, reads

    @property
    def kv_heads(self) -> int:
        return self._reader.shares.heads.count

    def vector(self, name: str) -> Tensor:
        return self._reader.tensor(self._shapes[name], self._reads[name])

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
