"""Gives modules on the meta device their parameters, one at a time, counting them."""

import copy
import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from apportion.model.weights.checkpoint import Weights
from apportion.model.weights.experts import ExpertMatrices
from apportion.model.weights.formats import WEIGHT_FORMATS
from apportion.model.weights.linear import PackedLinear
from apportion.model.weights.load_memory import LoadMemory
from apportion.model.weights.matrix_source import MatrixSource, expert_reads
from apportion.model.weights.shard import (
    Axis,
    Placement,
    RankShares,
    Shape,
    ShardedDim,
    placements,
    sharded_dim,
    whole_placements,
)
from apportion.model.weights.vocabulary import LookupTable
from apportion.model.weights.weight_backend import WeightBackend
from apportion.model.weights.weight_memory import Allocate
from apportion.types.errors import ModelError
from apportion.types.model import ModelSpec
from apportion.types.plan import Stage

_EMBEDDING_NAME = "model.embed_tokens.weight"
_NORM_NAME = "model.norm.weight"
_HEAD_NAME = "lm_head.weight"
_EXPERTS = "mlp.experts."

Reads = tuple[Placement, ...]


def parameter_shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


class ParameterReader:
    """Reads a member's part of each parameter; `memory` is told of each.

    Matrices are in the stage's weight format, all else (norms, biases, routers) in its activations'.
    """

    def __init__(
        self,
        weights: Weights,
        model: ModelSpec,
        stage: Stage,
        shares: RankShares,
        backend: WeightBackend,
        memory: LoadMemory,
    ) -> None:
        self.weights = weights
        self._format = WEIGHT_FORMATS[stage.weight_format]
        self._packed = stage.weight_format != stage.activation_format
        self.backend = backend
        self.shares = shares
        self.parameters = 0
        self.weights_bytes = 0
        self._model = model
        self._memory = memory
        self._allocate: Allocate = backend.allocate

    def elsewhere(self, allocate: Allocate, weights: Weights | None = None) -> "ParameterReader":
        """A reader for the same stage that puts matrices and all else where `allocate` says, and counts for itself."""
        other = copy.copy(self)
        other._allocate, other.weights = allocate, weights or self.weights
        other.parameters = other.weights_bytes = 0
        return other

    def layer(
        self, layer: nn.Module, index: int, full: dict[str, Shape], shrunk: dict[Axis, dict[str, Shape]]
    ) -> None:
        """Fills a layer, given its parameters' full shapes and their shapes with each axis shrunk. Its linear modules
        are replaced by packed ones."""
        shapes = parameter_shapes(layer)
        reads = {name: self._reads(f"model.layers.{index}.", name, full[name], shrunk) for name in shapes}
        linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        for name in linears:
            bias = f"{name}.bias"
            source = self.source(shapes.pop(f"{name}.weight"), reads[f"{name}.weight"])
            bias_N = self.read(shapes.pop(bias), reads[bias]) if bias in shapes else None
            layer.set_submodule(name, self.linear(source, bias_N))
        for name, shape in shapes.items():
            module_name, _, leaf = name.rpartition(".")
            module = layer.get_submodule(module_name)
            if self._packed and name.startswith(_EXPERTS):
                delattr(module, leaf)
                setattr(module, leaf, self._experts(shape, reads[name]))
            else:
                setattr(module, leaf, self._parameter(shape, reads[name]))

    def lookup_table(self, multiplier: float) -> LookupTable:
        source = self._vocab_source(_EMBEDDING_NAME)
        backend = self.backend
        table = LookupTable(source, self._format, backend.dtype, backend.torch_device, multiplier)
        self._count(source.rows * source.columns, table.weights_bytes)
        return table

    def head(self, table: LookupTable | None) -> Callable[[Tensor], Tensor]:
        """A tied head shares the table of an embedding in the same stage, where that is not packed."""
        if self._model.tied_embeddings and table is not None:
            if not self._packed:
                return lambda hidden_NH: F.linear(hidden_NH, table.rows_VH)
            linear = self.linear(self._vocab_source(_EMBEDDING_NAME), None)
            self.parameters -= linear.in_features * linear.out_features  # counted as the table's
            return linear
        return self.linear(
            self._vocab_source(_EMBEDDING_NAME if self._model.tied_embeddings else _HEAD_NAME), None
        )

    def final_norm(self) -> Tensor:
        shape: Shape = (self._model.hidden_size,)
        return self.read(shape, tuple(whole_placements(_NORM_NAME, shape, None)))

    def _reads(self, prefix: str, name: str, full: Shape, shrunk: dict[Axis, dict[str, Shape]]) -> Reads:
        shrunk_shapes: dict[Axis, Shape] = {axis: shapes[name] for axis, shapes in shrunk.items()}
        return self.placed(
            prefix, name, full, sharded_dim(name, full, shrunk_shapes, self._model, self.shares)
        )

    def placed(self, prefix: str, name: str, full: Shape, sharded: ShardedDim | None) -> Reads:
        return tuple(placements(prefix, name, self._model.family, self.weights, full, sharded))

    def source(self, shape: Shape, reads: Reads) -> MatrixSource:
        """Of a matrix of `shape`, the member's part of it."""
        rows, columns = shape
        return MatrixSource(weights=self.weights, reads=reads, rows=rows, columns=columns)

    def _vocab_source(self, name: str) -> MatrixSource:
        full: Shape = (self._model.vocab_rows, self._model.hidden_size)
        sharded = ShardedDim(dim=0, segments=(self._model.vocab_rows,), share=self.shares.vocab)
        reads = tuple(whole_placements(name, full, sharded))
        return self.source((self.shares.vocab.count, full[1]), reads)

    def linear(self, source: MatrixSource, bias_N: Tensor | None) -> PackedLinear:
        linear = PackedLinear(source, self._format, self.backend, bias_N, self._allocate)
        self._count(source.rows * source.columns, linear.weights_bytes)
        return linear

    def _experts(self, shape: Shape, reads: Reads) -> ExpertMatrices:
        if any(len(read.source_shape) != 2 for read in reads):
            raise ModelError(
                f"{self._model.name}: '{reads[0].source}' holds all experts in one tensor, which cannot be packed as"
                f" {self._format.name}; use --weights fp32"
            )
        _, rows, columns = shape
        by_expert = [self.source((rows, columns), expert_reads(reads, expert)) for expert in range(shape[0])]
        return ExpertMatrices([self.linear(source, None) for source in by_expert])

    def _parameter(self, shape: Shape, reads: Reads) -> nn.Parameter:
        return nn.Parameter(self.read(shape, reads), requires_grad=False)

    def read(self, shape: Shape, reads: Reads) -> Tensor:
        dtype = self.backend.dtype
        tensor = self._allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        for read in reads:
            self.weights.check_shape(read.source, read.source_shape)
            self.weights.read_into(tensor[read.target], read.source, read.ranges)
        self._count(tensor.numel(), tensor.nbytes)
        return tensor

    def _count(self, parameters: int, weights_bytes: int) -> None:
        self.parameters += parameters
        self.weights_bytes += weights_bytes
        self._memory.observe()
