"""Collectives inside a tensor-parallel group by direct exchange: every member gives its partial to every other.

A message per pair and reduction costs one latency where a ring costs `size − 1`, which is what counts for the few
kilobytes of a decode step; members need not be equal. All members add the partials in rank order, so they hold the same
bits. benchmarks/reductions.py times the ways to exchange.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from apportion.transport.pairs import SocketExchange, connect_pairs
from apportion.transport.shared import SharedExchange, can_share_memory


class Exchange(Protocol):
    """Tensors are on the host. Both raise PeerLostError."""

    @property
    def summed_bytes(self) -> int:
        """That went to every other member for sums."""
        ...

    def total(self, mine: Tensor) -> Tensor:
        """The sum over all members in rank order; it may take the place of `mine`."""
        ...

    def collect(self, mine: Tensor, num_columns: list[int]) -> list[Tensor]:
        """On rank 0 all members' tensors, of `num_columns[r]` columns and equally many rows; on the others []."""
        ...

    def close(self) -> None: ...


class TensorGroup:
    """Member `rank` of `size`; `sent_bytes[r]` counts what went to rank `r`; `shared` is the exchange where that is
    through shared memory.

    A member waits actively for at most `spin_s`: right where every member has a core to itself.
    """

    def __init__(self, run_dir: Path, name: str, rank: int, size: int, *, spin_s: float) -> None:
        self.rank, self.size = rank, size
        pairs = connect_pairs(run_dir, name, rank, size)
        self._peers = sorted(pairs)
        self.shared = SharedExchange(rank, pairs, spin_s) if size > 1 and can_share_memory() else None
        self._exchange: Exchange = self.shared or SocketExchange(rank, pairs)
        self.reset_counts()

    def reset_counts(self) -> None:
        self._summed_before, self._gathered_bytes = self._exchange.summed_bytes, 0

    @property
    def sent_bytes(self) -> dict[int, int]:
        summed = self._exchange.summed_bytes - self._summed_before
        return {peer: summed + (0 if peer else self._gathered_bytes) for peer in self._peers}

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over all members, on each of them: like `partial`, a tensor of the host, whose place it may take.

        Raises PeerLostError.
        """
        if self.size == 1:
            return partial
        return self._exchange.total(partial)

    def gather_columns(self, part_NV: Tensor, num_columns: list[int]) -> Tensor | None:
        """All members' columns, `num_columns[r]` of rank r, side by side on rank 0; None on the others."""
        if self.size == 1:
            return part_NV
        parts = self._exchange.collect(part_NV.cpu().contiguous(), num_columns)
        if self.rank != 0:
            self._gathered_bytes += part_NV.nbytes
            return None
        return torch.cat(parts, dim=1).to(part_NV.device)

    def close(self) -> None:
        self._exchange.close()
