"""Carries out a step's moves of KV blocks: between blocks, and to and from the swap space.

That is a shared mapping, which RLIMIT_DATA does not count. A block's heads lie apart, and one compiled call moves all
blocks of a tensor: torch takes some microseconds for each run of neighbours. Shapes: B = blocks, W = swap slots,
K = local KV heads, X = bytes of one head of a block, M = moves.
"""

import mmap
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from apportion.native.machine_code import keep_machine_code
from apportion.types.request import BlockMove

keep_machine_code()

_BYTES, _PAIRS = types.uint8[:, :, ::1], types.int64[:, ::1]


def _copy(source_KBX, target_KBX, moves_M2):
    for move in range(len(moves_M2)):
        for k in range(len(source_KBX)):
            source_X, target_X = source_KBX[k, moves_M2[move, 0]], target_KBX[k, moves_M2[move, 1]]
            for x in range(len(source_X)):
                target_X[x] = source_X[x]


_copy_blocks: Callable[..., None] = njit(types.void(_BYTES, _BYTES, _PAIRS), nogil=True, cache=True)(_copy)


class CpuBlockMover:
    """See `BlockMover`; `pool_B` are tensors with the block as first dimension."""

    def __init__(self, pool_B: Sequence[Tensor], num_swap_blocks: int) -> None:
        swap_W = [_swap_space(tensor_B, num_swap_blocks) for tensor_B in pool_B]
        self.host_bytes = sum(tensor_W.nbytes for tensor_W in swap_W)
        self._arrays = [(_bytes(own), _bytes(swap)) for own, swap in zip(pool_B, swap_W, strict=True)]

    def apply(self, moves: Sequence[BlockMove]) -> None:
        for kind, same in groupby(moves, key=lambda move: move.kind):
            moves_M2 = np.array([(move.src, move.dst) for move in same], np.int64)
            for on_device_KBX, on_host_KWX in self._arrays:
                source = on_host_KWX if kind == "swap in" else on_device_KBX
                _copy_blocks(source, on_host_KWX if kind == "swap out" else on_device_KBX, moves_M2)


def _bytes(tensor_B: Tensor) -> np.ndarray:
    """bytes_KBX of a tensor whose heads lie apart."""
    return tensor_B.transpose(0, 1).flatten(2).view(torch.uint8).numpy()


def _swap_space(like_B: Tensor, num_blocks: int) -> Tensor:
    """Room for `num_blocks` blocks of `like_B`; every page is touched now, so that it is there when needed."""
    shape = (num_blocks, *like_B.shape[1:])
    apart = (shape[1], num_blocks, *shape[2:])
    if num_blocks == 0:
        return torch.empty(apart, dtype=like_B.dtype).transpose(0, 1)
    mapping = mmap.mmap(-1, num_blocks * like_B[0].nbytes)
    return torch.frombuffer(mapping, dtype=like_B.dtype).view(apart).zero_().transpose(0, 1)
