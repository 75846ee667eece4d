"""Tensors as the bytes of a message. Apart from `wire`, so that the coordinator needs no torch."""

import numpy as np
import torch
from torch import Tensor


def flat_bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, as bytes."""
    return x.view(-1).view(torch.uint8).numpy().data


def tensor_bytes(x: Tensor) -> memoryview:
    """The tensor's elements as bytes, wherever it is."""
    return flat_bytes(x.detach().cpu().contiguous())


def tensor_from_bytes(data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of its own on the host; one dimension may be -1."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).view(dtype).view(shape)
