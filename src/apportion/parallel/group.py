"""Collectives inside a tensor-parallel group by direct exchange: every member sends its partial to every other.

A message per pair and reduction costs one latency where a ring costs `size − 1`, which is what counts for the few
kilobytes of a decode step; members need not be equal. All members add the partials in rank order, so they hold
the same bits.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import zmq
from torch import Tensor

from apportion.parallel.links import LINGER_MS, inbox_address
from apportion.parallel.wire import tensor_bytes, tensor_from_bytes


class TensorGroup:
    """Member `rank` of `size`. `before_send` runs ahead of each exchange (an emulated device's pacing).

    `sent_bytes[r]` counts what went to rank `r`.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        run_dir: Path,
        name: str,
        rank: int,
        size: int,
        before_send: Callable[[], None],
    ) -> None:
        self.rank, self.size = rank, size
        self.sent_bytes: dict[int, int] = {}
        self._before_send = before_send
        self._peers: dict[int, zmq.Socket[bytes]] = {}
        for peer in (r for r in range(size) if r != rank):
            low, high = sorted((rank, peer))
            address = inbox_address(run_dir, f"{name}-{low}-{high}")
            socket = context.socket(zmq.PAIR)
            socket.setsockopt(zmq.LINGER, LINGER_MS)
            socket.bind(address) if rank == low else socket.connect(address)
            self._peers[peer] = socket
        self.reset_counts()

    def reset_counts(self) -> None:
        self.sent_bytes = dict.fromkeys(self._peers, 0)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over all members, on each of them; same shape and device as `partial`."""
        if self.size == 1:
            return partial
        self._before_send()
        payload = tensor_bytes(partial)
        for peer in self._peers:
            self._send(peer, payload)
        total: Tensor | None = None
        for rank in range(self.size):
            part = partial if rank == self.rank else self._receive(rank, partial)
            total = part.clone() if total is None else total.add_(part)
        assert total is not None
        return total

    def gather_columns(self, part_NV: Tensor) -> Tensor | None:
        """All members' columns side by side in rank order on rank 0 (fp32), None on the others."""
        if self.size == 1:
            return part_NV
        self._before_send()
        if self.rank != 0:
            self._send(0, tensor_bytes(part_NV))
            return None
        rows = part_NV.shape[0]
        parts = [part_NV]
        for rank in range(1, self.size):
            part = tensor_from_bytes(self._peers[rank].recv(), part_NV.dtype, (rows, -1))
            parts.append(part.to(part_NV.device))
        return torch.cat(parts, dim=1)

    def close(self) -> None:
        for socket in self._peers.values():
            socket.close()

    def _send(self, peer: int, payload: memoryview) -> None:
        self._peers[peer].send(payload)
        self.sent_bytes[peer] += len(payload)

    def _receive(self, peer: int, like: Tensor) -> Tensor:
        return tensor_from_bytes(self._peers[peer].recv(), like.dtype, tuple(like.shape)).to(like.device)
