"""Exchange inside a group through memory that its members share: each writes its partial into a slot of its own, then
its counter; the others wait for the counter and read.

Messages are numbered, in the same order at all members. A member has two slots, used in turn: it writes message n once
all others have counted n − 1, and so have read n − 2. Waiting, waking and fp32 sums are compiled (`shared_code`), for
x86-64; elsewhere the sockets are used.
"""

import mmap
import os
import platform
import socket

import numpy as np
import torch
from torch import Tensor

from apportion.transport.pairs import Pairs, PeerLostError
from apportion.transport.shared_code import EXCHANGE, LINE_BYTES, add_up, await_number, count
from apportion.types.layout import EXCHANGE_PIECE_BYTES

_MOST_VIEWS = 16


def can_share_memory() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")


class SharedExchange:
    """See `group.Exchange`. Waits actively for `spin_s`, then asleep."""

    def __init__(self, rank: int, pairs: Pairs, spin_s: float) -> None:
        size = len(pairs) + 1
        self._rank, self._pairs = rank, pairs
        head_bytes = size * LINE_BYTES
        self._map = _shared_map(rank, pairs, head_bytes + 2 * size * EXCHANGE_PIECE_BYTES)
        slots = torch.frombuffer(self._map, dtype=torch.uint8, offset=head_bytes)
        self._slots = [list(half.view(size, EXCHANGE_PIECE_BYTES)) for half in slots.view(2, -1)]
        self._views: dict[tuple[torch.dtype, torch.Size], list[list[Tensor]]] = {}
        sockets = [pairs[peer].fileno() if peer in pairs else -1 for peer in range(size)]
        self._sockets_R = np.array(sockets, np.int64)
        self._state = np.zeros((), EXCHANGE)
        self.address = self._state.ctypes.data
        for name, value in {
            "rank": rank,
            "size": size,
            "lines": slots.data_ptr() - head_bytes,
            "slots": slots.data_ptr(),
            "elements": EXCHANGE_PIECE_BYTES // torch.float32.itemsize,
            "spin_ns": round(spin_s * 1e9),
            "sockets": self._sockets_R.ctypes.data,
        }.items():
            self._state[name] = value

    @property
    def summed_bytes(self) -> int:
        return int(self._state["summed_bytes"])

    def check(self) -> None:
        """Raises PeerLostError where a member was found gone."""
        if self._state["lost"]:
            raise PeerLostError(f"rank {self._state['lost'] - 1} closed its socket")

    def total(self, mine: Tensor) -> Tensor:
        """In place of `mine`, where that is contiguous."""
        mine = mine.contiguous()
        if mine.dtype == torch.float32:
            add_up(self.address, mine.data_ptr(), mine.numel())
            self.check()
            return mine
        self._state["summed_bytes"] += mine.nbytes
        for piece in mine.view(-1).split(EXCHANGE_PIECE_BYTES // mine.element_size()):
            self._add(piece)
        return mine

    def collect(self, mine: Tensor, num_columns: list[int]) -> list[Tensor]:
        parts = [mine]
        if self._rank == 0:
            parts += [mine.new_empty(len(mine), columns) for columns in num_columns[1:]]
        flat = [part.view(-1) for part in parts]
        elements = EXCHANGE_PIECE_BYTES // mine.element_size()
        for start in range(0, len(mine) * max(num_columns[1:]), elements):
            piece = slice(start, start + elements)
            if self._rank == 0:
                self._read([part[piece] for part in flat[1:]])
            else:
                self._write(flat[0][piece])
        return parts if self._rank == 0 else []

    def close(self) -> None:
        for pair in self._pairs.values():
            pair.close()

    def _add(self, mine: Tensor) -> None:
        parts = self._write(mine)
        self._await_all(self._number)
        torch.add(parts[0], parts[1], out=mine)
        for part in parts[2:]:
            mine.add_(part)

    def _write(self, mine: Tensor) -> list[Tensor]:
        """Publishes one piece; returns all members' slots, shaped as it is."""
        parts = self._shaped(mine)[self._number % 2]
        self._await_all(self._number)
        parts[self._rank].copy_(mine)
        count(self.address)
        return parts

    def _read(self, pieces: list[Tensor]) -> None:
        """Takes the others' next piece, whatever length each has, and counts it only then."""
        self._await_all(self._number + 1)
        slots = self._slots[self._number % 2]
        for piece, slot in zip(pieces, slots[1:], strict=True):
            piece.copy_(slot[: piece.nbytes].view(piece.dtype))
        count(self.address)

    def _shaped(self, mine: Tensor) -> list[list[Tensor]]:
        """Both slots of every member as tensors like `mine`."""
        key = (mine.dtype, mine.shape)
        views = self._views.get(key)
        if views is None:
            if len(self._views) == _MOST_VIEWS:
                self._views.clear()
            views = self._views[key] = [
                [slot[: mine.nbytes].view(mine.dtype).view(mine.shape) for slot in half]
                for half in self._slots
            ]
        return views

    @property
    def _number(self) -> int:
        return int(self._state["number"])

    def _await_all(self, number: int) -> None:
        if not await_number(self.address, number):
            self.check()


def _shared_map(rank: int, pairs: Pairs, num_bytes: int) -> mmap.mmap:
    """Rank 0 makes it and hands it on through the sockets; it has no name, and ends with the last that maps it."""
    try:
        if rank == 0:
            descriptor = os.memfd_create("apportion-group")
            os.ftruncate(descriptor, num_bytes)
            for pair in pairs.values():
                socket.send_fds(pair, [b"m"], [descriptor])
        else:
            _, (descriptor,), _, _ = socket.recv_fds(pairs[0], 1, 1)
    except (OSError, ValueError) as error:
        raise PeerLostError(str(error)) from error
    shared = mmap.mmap(descriptor, num_bytes)
    os.close(descriptor)
    return shared
