"""Streamed layers: their weights stay in host memory or on disk and pass through buffers on the device, in every step.

A layer is built like one that is held, but in a buffer, and then its bytes are kept in a `LayerStore`. Where there are
two buffers it is built in both, and what runs is the one in the buffer that its weights arrived in: nothing in a layer
knows that it is streamed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.model.weights.checkpoint import Range, Weights
from apportion.model.weights.layer_store import LayerStore, OpenStore
from apportion.model.weights.parameters import ParameterReader
from apportion.model.weights.weight_memory import LayerBuffer, Sizing
from apportion.types.model import ModelSpec
from apportion.types.plan import Stage

Layer = Callable[..., Tensor]
MakeLayer = Callable[[ParameterReader, int], Layer]
"""Builds the layer of an index from what the reader gives."""


class LayerStream:
    """Brings the weights of the layers that it made, which run in that order."""

    def __init__(self, store: LayerStore, reader: ParameterReader, buffer_bytes: int) -> None:
        self.streamed_bytes = 0
        """That arrived so far."""
        self.buffer_bytes = buffer_bytes * store.num_buffers
        """Before they are rounded up to whole pages."""
        self._store = store
        self._reader = reader
        self._buffers = [LayerBuffer(buffer_bytes, reader.backend.allocate) for _ in range(store.num_buffers)]
        self._sizes: list[int] = []
        self._num_uses = 0

    def layer(self, make: MakeLayer, index: int) -> Layer:
        """The layer `index`, one more to stream."""
        first, *others = self._buffers
        reader = self._reader.elsewhere(first.allocate)
        versions = [make(reader, index)]
        self._store.keep(first.bytes_B)
        self._reader.parameters += reader.parameters
        self._sizes.append(reader.weights_bytes)
        read_bytes = reader.weights.read_bytes
        versions += [make(self._reader.elsewhere(buffer.allocate), index) for buffer in others]
        reader.weights.read_bytes = read_bytes  # the same bytes again do not count
        for buffer in self._buffers:
            buffer.restart()
        return StreamedLayer(self, len(self._sizes) - 1, versions)

    @property
    def num_buffers(self) -> int:
        return len(self._buffers)

    @property
    def next_buffer(self) -> int:
        """In which the next layer arrives."""
        return self._num_uses % len(self._buffers)

    def arrive(self, layer: int) -> int:
        """Brings the weights of the `layer`-th of those streamed; the number of the buffer that has them."""
        buffer, others = self.next_buffer, self.num_buffers - 1
        if not others or not self._num_uses:
            self._fetch(layer, buffer)
        if others:  # the layer before has been computed: the next may arrive right behind this one
            self._fetch((layer + 1) % len(self._sizes), 1 - buffer)
        self._store.arrived()
        self._num_uses += 1
        self.streamed_bytes += self._sizes[layer]
        return buffer

    def _fetch(self, layer: int, buffer: int) -> None:
        self._store.fetch(layer, self._buffers[buffer].bytes_B)


class StreamedLayer:
    """Called like the layer it stands for."""

    def __init__(self, stream: LayerStream, number: int, versions: Sequence[Layer]) -> None:
        self._stream, self._number, self._versions = stream, number, versions

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        return self._versions[self.arrive()](*inputs, **named)

    def arrive(self) -> int:
        """Brings its weights; the number of the buffer that has them."""
        return self._stream.arrive(self._number)

    def in_step(self, first_buffer: int) -> Layer:
        """The layer as it is in a step whose first streamed layer arrives in this buffer."""
        return self._versions[(first_buffer + self._number) % len(self._versions)]


def build_layers(
    make: MakeLayer, reader: ParameterReader, model: ModelSpec, stage: Stage, open_store: OpenStore
) -> tuple[list[Layer], LayerStream | None]:
    """The stage's layers, and what brings the weights of those that it streams."""
    stream: LayerStream | None = None
    if stage.streamed_layers:
        kinds = {model.layers[index]: index for index in stage.streamed_layers}
        stream = LayerStream(open_store(), reader, _largest_bytes(make, reader, kinds.values()))
    layers = [
        stream.layer(make, index) if stream and index in stage.streamed_layers else make(reader, index)
        for index in range(stage.layer_start, stage.layer_stop)
    ]
    return layers, stream


def _largest_bytes(make: MakeLayer, reader: ParameterReader, indices: Iterable[int]) -> int:
    """Of a buffer for any of the layers `indices`."""
    largest_bytes = 0
    for index in indices:
        sizing = Sizing(reader.backend.allocate)
        make(reader.elsewhere(sizing.allocate, _Zeros(reader.weights)), index)
        largest_bytes = max(largest_bytes, sizing.buffer_bytes)
    return largest_bytes


class _Zeros:
    """The names of a checkpoint without its values."""

    read_bytes = 0

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        pass

    def read_into(self, target: Tensor, name: str, ranges: tuple[Range, ...]) -> None:
        del name, ranges
        target.zero_()

    def row_peaks(self, name: str, start: int, stop: int) -> Tensor:
        del name
        return torch.zeros(stop - start)
