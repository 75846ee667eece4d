"""Gives modules on the meta device their parameters, one at a time, counting them."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from apportion.model.shard import (
    Axis,
    Placement,
    RankShares,
    Shape,
    ShardedDim,
    placements,
    sharded_dim,
    whole_placements,
)
from apportion.model.streaming import LayerStream, StreamedLayer, StreamedParameter, stream_layers
from apportion.model.weights import FORMAT_DTYPES, Weights
from apportion.types.model import ModelSpec
from apportion.types.plan import Stage

_EMBEDDING_NAME = "model.embed_tokens.weight"
_NORM_NAME = "model.norm.weight"
_HEAD_NAME = "lm_head.weight"


def parameter_shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


class ParameterReader:
    """Reads a member's part of each parameter; `observe_memory` is called after each."""

    def __init__(
        self,
        weights: Weights,
        model: ModelSpec,
        stage: Stage,
        shares: RankShares,
        torch_device: str,
        observe_memory: Callable[[], None],
    ) -> None:
        self._weights = weights
        assert stage.weight_format == stage.activation_format, "packed weights are not implemented"
        self.dtype = FORMAT_DTYPES[stage.weight_format]
        self.torch_device = torch_device
        self.shares = shares
        self.parameters = 0
        self.streamed_parameters = 0
        """Of them."""
        self._model = model
        self._observe_memory = observe_memory

    def layer(
        self, layer: nn.Module, index: int, full: dict[str, Shape], shrunk: dict[Axis, dict[str, Shape]]
    ) -> None:
        """Fills a layer, given its parameters' full shapes and their shapes with each axis shrunk."""
        for name, shape in parameter_shapes(layer).items():
            sharded = sharded_dim(name, full[name], _of(name, shrunk), self._model, self.shares)
            _set(layer, name, self._read(shape, self._reads(index, name, full[name], sharded)))

    def streamed_layer(self, layer: nn.Module, index: int) -> StreamedLayer:
        """The same for a whole layer, of one member, whose weights are to be streamed."""
        parameters: list[StreamedParameter] = []
        for name, shape in parameter_shapes(layer).items():
            parameter = nn.Parameter(
                torch.empty(0, dtype=self.dtype, device=self.torch_device), requires_grad=False
            )
            _set(layer, name, parameter)
            reads = tuple(self._reads(index, name, shape, None))
            parameters.append(StreamedParameter(parameter=parameter, shape=shape, reads=reads))
        streamed = StreamedLayer(module=layer, parameters=tuple(parameters))
        self.parameters += streamed.num_parameters
        self.streamed_parameters += streamed.num_parameters
        return streamed

    def stream(self, layers: Sequence[StreamedLayer]) -> LayerStream:
        """Begins to stream `layers`; what that reads by now is not counted as read."""
        read_bytes = self._weights.read_bytes
        stream = stream_layers(layers, self._weights, self.dtype, self.torch_device)
        self._weights.read_bytes = read_bytes
        self._observe_memory()
        return stream

    def _reads(self, index: int, name: str, full: Shape, sharded: ShardedDim | None) -> Iterator[Placement]:
        return placements(f"model.layers.{index}.", name, self._model.family, self._weights, full, sharded)

    def embedding_weight(self) -> nn.Parameter:
        return self._vocab_table(_EMBEDDING_NAME)

    def head_weight(self, embedding: nn.Embedding | None) -> Tensor:
        """A tied head shares the table of an embedding in the same stage."""
        if not self._model.tied_embeddings:
            return self._vocab_table(_HEAD_NAME)
        return self._vocab_table(_EMBEDDING_NAME) if embedding is None else embedding.weight

    def final_norm(self, norm: nn.Module) -> nn.Module:
        shape: Shape = (self._model.hidden_size,)
        norm.weight = self._read(shape, whole_placements(_NORM_NAME, shape, None))
        return norm

    def _vocab_table(self, name: str) -> nn.Parameter:
        full: Shape = (self._model.vocab_rows, self._model.hidden_size)
        sharded = ShardedDim(dim=0, segments=(self._model.vocab_rows,), share=self.shares.vocab)
        return self._read((self.shares.vocab.count, full[1]), whole_placements(name, full, sharded))

    def _read(self, shape: Shape, reads: Iterable[Placement]) -> nn.Parameter:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.torch_device)
        for read in reads:
            self._weights.check_shape(read.source, read.source_shape)
            self._weights.read_into(tensor[read.target], read.source, read.ranges)
        self.parameters += tensor.numel()
        self._observe_memory()
        return nn.Parameter(tensor, requires_grad=False)


def _of(name: str, shrunk: dict[Axis, dict[str, Shape]]) -> dict[Axis, Shape]:
    return {axis: shapes[name] for axis, shapes in shrunk.items()}


def _set(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module_name, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(module_name), leaf, parameter)
