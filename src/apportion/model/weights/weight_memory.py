"""Where weights are put: each matrix has memory of its own, or layers that are streamed take turns in a buffer."""

from collections.abc import Callable

import torch
from torch import Tensor

Allocate = Callable[[int], Tensor]
"""Memory of so many bytes on the device: a tensor of uint8."""

PAGE_BYTES = 4096
_ALIGNED_BYTES = 64
"""Every allocation in a buffer begins at a multiple of it."""


class Sizing:
    """Finds out how large a buffer must be: everything is put in one place, and nothing is kept."""

    def __init__(self, allocate: Allocate) -> None:
        self.buffer_bytes = 0
        self._allocate = allocate
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def allocate(self, num_bytes: int) -> Tensor:
        self.buffer_bytes += _aligned(num_bytes, _ALIGNED_BYTES)
        if len(self._scratch) < num_bytes:
            self._scratch = self._allocate(num_bytes)
        return self._scratch[:num_bytes]


class LayerBuffer:
    """Holds the weights of one layer after another: each allocates in the same order, from the buffer's start."""

    def __init__(self, num_bytes: int, allocate: Allocate) -> None:
        """Takes whole pages."""
        size = _aligned(num_bytes, PAGE_BYTES)
        memory = allocate(size + PAGE_BYTES)
        start = -memory.data_ptr() % PAGE_BYTES
        self.bytes_B = memory[start : start + size]
        self._taken_bytes = 0

    def restart(self) -> None:
        self._taken_bytes = 0

    def allocate(self, num_bytes: int) -> Tensor:
        start = self._taken_bytes
        self._taken_bytes += _aligned(num_bytes, _ALIGNED_BYTES)
        assert self._taken_bytes <= len(self.bytes_B)
        return self.bytes_B[start : start + num_bytes]


def _aligned(num_bytes: int, unit_bytes: int) -> int:
    return -(-num_bytes // unit_bytes) * unit_bytes
