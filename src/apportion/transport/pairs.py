"""Unix sockets between every two members of a group, and the exchange over them.

Used where memory cannot be shared safely (see `shared`); always kept open, since a closed one tells of a lost member.
"""

import socket
from pathlib import Path

import torch
from torch import Tensor

from apportion.transport.tensors import flat_bytes
from apportion.types.clock import SYSTEM_CLOCK, Clock

Pairs = dict[int, socket.socket]
"""By the other member's rank."""

_PIECE_BYTES = 2**15
"""Members send a piece to all, then receive one from all. At most two pieces of a member are then on their way to
another, which its socket holds (Linux: 208 KiB), so that no send waits for a receive and none can deadlock."""
_CONNECT_S = 60.0
_RETRY_S = 0.01


class PeerLostError(ConnectionError):
    """Another member is gone; its process tells why."""


class SocketExchange:
    """See `group.Exchange`."""

    def __init__(self, rank: int, pairs: Pairs) -> None:
        self._rank, self._pairs = rank, pairs
        self.summed_bytes = 0

    def total(self, mine: Tensor) -> Tensor:
        mine = mine.contiguous()
        self.summed_bytes += mine.nbytes
        parts = {peer: torch.empty_like(mine) for peer in self._pairs}
        self._exchange(flat_bytes(mine), {peer: flat_bytes(part) for peer, part in parts.items()})
        parts[self._rank] = mine
        total = torch.add(parts[0], parts[1])
        for rank in range(2, len(parts)):
            total.add_(parts[rank])
        return total

    def collect(self, mine: Tensor, num_columns: list[int]) -> list[Tensor]:
        if self._rank != 0:
            self._send(0, flat_bytes(mine))
            return []
        parts = [mine, *(mine.new_empty(len(mine), columns) for columns in num_columns[1:])]
        for peer in range(1, len(parts)):
            self._receive(peer, flat_bytes(parts[peer]))
        return parts

    def close(self) -> None:
        for pair in self._pairs.values():
            pair.close()

    def _exchange(self, data: memoryview, into: dict[int, memoryview]) -> None:
        for start in range(0, len(data), _PIECE_BYTES):
            piece = slice(start, start + _PIECE_BYTES)
            for peer in self._pairs:
                self._send(peer, data[piece])
            for peer, buffer in into.items():
                self._receive(peer, buffer[piece])

    def _send(self, peer: int, data: memoryview) -> None:
        try:
            self._pairs[peer].sendall(data)
        except OSError as error:
            raise PeerLostError(str(error)) from error

    def _receive(self, peer: int, buffer: memoryview) -> None:
        received = 0
        while received < len(buffer):
            try:
                count = self._pairs[peer].recv_into(buffer[received:])
            except OSError as error:
                raise PeerLostError(str(error)) from error
            if count == 0:
                raise PeerLostError(f"rank {peer} closed its socket")
            received += count


def connect_pairs(run_dir: Path, name: str, rank: int, size: int, clock: Clock = SYSTEM_CLOCK) -> Pairs:
    """The lower rank of a pair listens, the higher connects."""
    listeners = {peer: _listen(run_dir / f"{name}-{rank}-{peer}") for peer in range(rank + 1, size)}
    pairs = {peer: _connect(run_dir / f"{name}-{peer}-{rank}", clock) for peer in range(rank)}
    for peer, listener in listeners.items():
        with listener:
            pairs[peer], _ = listener.accept()
        (run_dir / f"{name}-{rank}-{peer}").unlink(missing_ok=True)
    return pairs


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def _connect(path: Path, clock: Clock) -> socket.socket:
    """Waits until the other member listens."""
    deadline_s = clock.now_s() + _CONNECT_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError) as error:
            connection.close()
            if clock.now_s() > deadline_s:
                raise PeerLostError(f"no member listens at {path.name}") from error
            clock.sleep(_RETRY_S)
