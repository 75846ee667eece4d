"""Carries out a step's moves of KV blocks: between blocks, and to and from the swap space in the host's memory.

The swap space is no memory of the device: on a CPU a shared mapping, which RLIMIT_DATA does not count, on CUDA
pinned host memory. Shapes: B = blocks, W = swap slots.
"""

import mmap
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from apportion.types.request import BlockMove


class BlockMover:
    """Moves between and out of `pool_B` tensors, each with the block as first dimension."""

    def __init__(self, pool_B: Sequence[Tensor], num_swap_blocks: int) -> None:
        self._pool_B = pool_B
        self._swap_W = [_host_space(tensor_B, num_swap_blocks) for tensor_B in pool_B]

    @property
    def host_bytes(self) -> int:
        return sum(tensor_W.nbytes for tensor_W in self._swap_W)

    def apply(self, moves: Sequence[BlockMove]) -> None:
        """In order: a move may read what an earlier one has written."""
        for (kind, src, dst), count in runs(moves):
            for on_device_B, on_host_W in zip(self._pool_B, self._swap_W, strict=True):
                source = on_host_W if kind == "swap in" else on_device_B
                target = on_host_W if kind == "swap out" else on_device_B
                target[dst : dst + count].copy_(source[src : src + count], non_blocking=True)
        if self._pool_B[0].is_cuda:
            torch.cuda.synchronize(self._pool_B[0].device)


def runs(moves: Sequence[BlockMove]) -> Iterator[tuple[BlockMove, int]]:
    """Swaps of neighbours to neighbours as one: its first move and its length. A copy between blocks stays alone, for
    it may read what the one before has written."""
    first: BlockMove | None = None
    count = 0
    for move in moves:
        if (
            first is not None
            and move == (first.kind, first.src + count, first.dst + count)
            and move.kind != "copy"
        ):
            count += 1
            continue
        if first is not None:
            yield first, count
        first, count = move, 1
    if first is not None:
        yield first, count


def _host_space(like_B: Tensor, num_blocks: int) -> Tensor:
    """Room for `num_blocks` blocks of `like_B`; on a CPU every page is touched now, so that it is there when needed."""
    shape = (num_blocks, *like_B.shape[1:])
    if num_blocks == 0:
        return torch.empty(shape, dtype=like_B.dtype)
    if like_B.is_cuda:
        return torch.empty(shape, dtype=like_B.dtype, pin_memory=True)
    mapping = mmap.mmap(-1, num_blocks * like_B[0].nbytes)
    return torch.frombuffer(mapping, dtype=like_B.dtype).view(shape).zero_()
