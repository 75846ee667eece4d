"""Streamed layers: their weights stay in host memory and pass through buffers on the device, in every step.

A layer's parameters are views of a buffer that holds the largest streamed layer. On a CPU there is one buffer, filled
before each layer by the thread that computes: a second thread would take the same core's time. On a GPU there are two;
a side stream fills one from pinned host memory while the layer in the other is computed.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apportion.model.shard import Placement, Shape
from apportion.model.weights import Checkpoint, Weights
from apportion.types.errors import ModelError

_ALIGNED_BYTES = 64
"""Every parameter begins at a multiple of it in a buffer."""
_DISK_FACTOR = 2.0
"""What was waited for this many times longer than it was copied came from a disk, not from the page cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedParameter:
    """`parameter` has no storage of its own."""

    parameter: nn.Parameter
    shape: Shape
    reads: tuple[Placement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedLayer:
    module: nn.Module
    parameters: tuple[StreamedParameter, ...]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(one.shape) for one in self.parameters)

    def starts(self, dtype: torch.dtype) -> list[int]:
        """Of each parameter in a buffer, in elements, and the end."""
        aligned = _ALIGNED_BYTES // dtype.itemsize
        sizes = (-(-math.prod(one.shape) // aligned) * aligned for one in self.parameters)
        return [0, *accumulate(sizes)]

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Its parameters in a buffer."""
        return [
            buffer[start : start + math.prod(one.shape)].view(one.shape)
            for start, one in zip(self.starts(buffer.dtype), self.parameters, strict=False)
        ]

    def read(self, weights: Weights, views: Sequence[Tensor]) -> None:
        for one, view in zip(self.parameters, views, strict=True):
            for read in one.reads:
                weights.check_shape(read.source, read.source_shape)
                weights.read_into(view[read.target], read.source, read.ranges)

    def bind(self, views: Sequence[Tensor]) -> None:
        for one, view in zip(self.parameters, views, strict=True):
            one.parameter.data = view


class LayerStream(Protocol):
    streamed_bytes: int
    """That arrived so far."""


def stream_layers(
    layers: Sequence[StreamedLayer], weights: Weights, dtype: torch.dtype, torch_device: str
) -> LayerStream:
    """From now on each of `layers`, which run in this order, finds its weights in place when it is called.

    Raises ModelError where a CPU has no files to copy from.
    """
    if torch_device == "cpu" and not isinstance(weights, Checkpoint):
        raise ModelError(
            "random weights are made, not read, so a CPU cannot stream them; give it more memory"
        )
    elements = max(layer.starts(dtype)[-1] for layer in layers)
    if torch_device == "cpu":
        return _Copies(layers, weights, torch.empty(elements, dtype=dtype))
    buffers = [torch.empty(elements, dtype=dtype, device=torch_device) for _ in range(2)]
    return _SideStream(layers, weights, buffers)


class _Copies:
    """On a CPU: one buffer, filled out of the checkpoint's files when a layer is called."""

    def __init__(self, layers: Sequence[StreamedLayer], weights: Weights, buffer: Tensor) -> None:
        self.streamed_bytes = 0
        self._layers = layers
        self._weights = weights
        self._views = [layer.views(buffer) for layer in layers]
        self._from_disk = False
        for index, (layer, views) in enumerate(zip(layers, self._views, strict=True)):
            layer.bind(views)
            layer.module.register_forward_pre_hook(partial(self._arrive, index))

    def _arrive(self, index: int, *_: Any) -> None:
        layer, views = self._layers[index], self._views[index]
        begun_s, begun_cpu_s = time.perf_counter(), time.thread_time()
        layer.read(self._weights, views)
        copied_s = time.thread_time() - begun_cpu_s
        waited_s = time.perf_counter() - begun_s - copied_s
        self._from_disk |= waited_s > _DISK_FACTOR * copied_s
        if self._from_disk:
            # The kernel reads the next layer from disk while this one is computed.
            following = self._layers[(index + 1) % len(self._layers)]
            for read in (read for one in following.parameters for read in one.reads):
                self._weights.will_read(read.source)
        self.streamed_bytes += sum(view.nbytes for view in views)


class _SideStream:
    """On a GPU: the n-th use of a streamed layer finds it in buffer n mod 2, filled while the one before it is
    computed from the other."""

    def __init__(self, layers: Sequence[StreamedLayer], weights: Weights, buffers: Sequence[Tensor]) -> None:
        self.streamed_bytes = 0
        self._layers = layers
        self._hosts = [_pinned(layer, weights, buffers[0].dtype) for layer in layers]
        self._buffers = buffers
        self._views = [[layer.views(buffer) for buffer in buffers] for layer in layers]
        self._copying = torch.cuda.Stream(buffers[0].device)
        self._copied = [torch.cuda.Event() for _ in buffers]
        self._num_used = self._num_copied = 0
        for layer in layers:
            layer.module.register_forward_pre_hook(self._arrive)
            layer.module.register_forward_hook(self._leave)
        for _ in buffers:
            self._copy_next()

    def _copy_next(self) -> None:
        """Begins to fill the next buffer, once what was enqueued so far has run: it may read what is overwritten."""
        index, number = self._num_copied % len(self._layers), self._num_copied % 2
        self._copying.wait_stream(torch.cuda.current_stream(self._buffers[0].device))
        with torch.cuda.stream(self._copying):
            host = self._hosts[index]
            self._buffers[number][: len(host)].copy_(host, non_blocking=True)
            self._copied[number].record(self._copying)
        self._num_copied += 1

    def _arrive(self, *_: Any) -> None:
        index, number = self._num_used % len(self._layers), self._num_used % 2
        torch.cuda.current_stream(self._buffers[0].device).wait_event(self._copied[number])
        self._layers[index].bind(self._views[index][number])
        self.streamed_bytes += sum(view.nbytes for view in self._views[index][number])

    def _leave(self, *_: Any) -> None:
        self._num_used += 1
        self._copy_next()


def _pinned(layer: StreamedLayer, weights: Weights, dtype: torch.dtype) -> Tensor:
    """Pinned host memory laid out as a buffer, with the layer's weights."""
    host = torch.empty(layer.starts(dtype)[-1], dtype=dtype, pin_memory=True)
    layer.read(weights, layer.views(host))
    return host
