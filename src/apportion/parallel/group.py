"""Collectives inside a tensor-parallel group by direct exchange: every member sends its partial to every other.

A message per pair and reduction costs one latency where a ring costs `size − 1`, which is what counts for the few
kilobytes of a decode step; members need not be equal. All members add the partials in rank order, so they hold the same
bits. Over Unix sockets, without ZeroMQ's two I/O threads on the way: benchmarks/reductions.py times both.
"""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from apportion.parallel.wire import flat_bytes

_PIECE_BYTES = 2**15
"""Members send a piece to all, then receive one from all. At most two pieces of a member are then on their way to
another, which its socket holds (Linux: 208 KiB), so that no send waits for a receive and none can deadlock."""
_CONNECT_S = 60.0


class PeerLostError(ConnectionError):
    """Another member is gone; its process tells why."""


class TensorGroup:
    """Member `rank` of `size`. `before_send` runs ahead of each exchange (an emulated device's pacing).

    `sent_bytes[r]` counts what went to rank `r`.
    """

    def __init__(
        self, run_dir: Path, name: str, rank: int, size: int, before_send: Callable[[], None]
    ) -> None:
        self.rank, self.size = rank, size
        self.sent_bytes: dict[int, int] = {}
        self._before_send = before_send
        self._peers = _connect_pairs(run_dir, name, rank, size)
        self.reset_counts()

    def reset_counts(self) -> None:
        self.sent_bytes = dict.fromkeys(self._peers, 0)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over all members, on each of them; same shape and device as `partial`. Raises PeerLostError."""
        if self.size == 1:
            return partial
        self._before_send()
        mine = partial.detach().cpu().contiguous()
        parts = {peer: torch.empty_like(mine) for peer in self._peers}
        self._exchange(flat_bytes(mine), {peer: flat_bytes(part) for peer, part in parts.items()})
        parts[self.rank] = mine
        total = parts[0].clone() if self.rank == 0 else parts[0]
        for rank in range(1, self.size):
            total.add_(parts[rank])
        return total.to(partial.device)

    def gather_columns(self, part_NV: Tensor, num_columns: list[int]) -> Tensor | None:
        """All members' columns, `num_columns[r]` of rank r, side by side on rank 0; None on the others."""
        if self.size == 1:
            return part_NV
        self._before_send()
        mine = part_NV.detach().cpu().contiguous()
        if self.rank != 0:
            self._send(0, flat_bytes(mine))
            return None
        parts = [mine, *(mine.new_empty(len(mine), columns) for columns in num_columns[1:])]
        for rank in range(1, self.size):
            self._receive(rank, flat_bytes(parts[rank]))
        return torch.cat(parts, dim=1).to(part_NV.device)

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def _exchange(self, data: memoryview, into: dict[int, memoryview]) -> None:
        for start in range(0, len(data), _PIECE_BYTES):
            piece = slice(start, start + _PIECE_BYTES)
            for peer in self._peers:
                self._send(peer, data[piece])
            for peer, buffer in into.items():
                self._receive(peer, buffer[piece])

    def _send(self, peer: int, data: memoryview) -> None:
        try:
            self._peers[peer].sendall(data)
        except OSError as error:
            raise PeerLostError(str(error)) from error
        self.sent_bytes[peer] += len(data)

    def _receive(self, peer: int, buffer: memoryview) -> None:
        received = 0
        while received < len(buffer):
            try:
                count = self._peers[peer].recv_into(buffer[received:])
            except OSError as error:
                raise PeerLostError(str(error)) from error
            if count == 0:
                raise PeerLostError(f"rank {peer} closed its socket")
            received += count


def _connect_pairs(run_dir: Path, name: str, rank: int, size: int) -> dict[int, socket.socket]:
    """A socket to every other member, by rank: the lower rank of a pair listens, the higher connects."""
    listeners = {peer: _listen(run_dir / f"{name}-{rank}-{peer}") for peer in range(rank + 1, size)}
    peers = {peer: _connect(run_dir / f"{name}-{peer}-{rank}") for peer in range(rank)}
    for peer, listener in listeners.items():
        with listener:
            peers[peer], _ = listener.accept()
    return peers


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def _connect(path: Path) -> socket.socket:
    """Waits until the other member listens."""
    deadline_s = time.monotonic() + _CONNECT_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError) as error:
            connection.close()
            if time.monotonic() > deadline_s:
                raise PeerLostError(f"no member listens at {path.name}") from error
            time.sleep(0.01)
