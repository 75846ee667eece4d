"""Carries out a step's moves of KV blocks: between blocks, and to and from the swap space in pinned host memory.

Shapes: B = blocks, W = swap slots.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from apportion.types.request import BlockMove


class TorchBlockMover:
    """See `BlockMover`; `pool_B` are tensors with the block as first dimension."""

    def __init__(self, pool_B: Sequence[Tensor], num_swap_blocks: int) -> None:
        self._pool_B = pool_B
        self._on_gpu = pool_B[0].is_cuda
        self._swap_W = [
            torch.zeros(
                (num_swap_blocks, *tensor_B.shape[1:]),
                dtype=tensor_B.dtype,
                pin_memory=self._on_gpu and num_swap_blocks > 0,
            )
            for tensor_B in pool_B
        ]
        self.host_bytes = sum(tensor_W.nbytes for tensor_W in self._swap_W)

    def apply(self, moves: Sequence[BlockMove]) -> None:
        for (kind, src, dst), count in runs(moves):
            for on_device_B, on_host_W in zip(self._pool_B, self._swap_W, strict=True):
                source = on_host_W if kind == "swap in" else on_device_B
                target = on_host_W if kind == "swap out" else on_device_B
                target[dst : dst + count].copy_(source[src : src + count], non_blocking=True)
        if self._on_gpu:
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
