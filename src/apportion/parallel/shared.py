"""Exchange inside a group through memory that its members share: each writes its partial into a slot of its own, then
its counter; the others wait for the counter and read.

Messages are numbered, in the same order at all members. A member has two slots, used in turn: it writes message n once
all others have counted n − 1, and so have read n − 2. That a counter is seen after the slot it speaks of is the
memory order of x86 (stores are seen in program order, loads are done in it); elsewhere the sockets are used.
"""

import mmap
import os
import platform
import select
import socket
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from apportion.parallel.pairs import Pairs, PeerLostError
from apportion.parallel.shared_code import LINE_WORDS, UNREAD, UNSEEN, add_parts, await_word, exchange

PIECE_BYTES = 2**16
"""Of a slot; larger messages go in pieces. Small enough to stay in a core's cache between writing and reading."""
_WORD_BYTES = 8
_LOOKS = 10_000
"""Between two looks at the clock: some microseconds."""
_SLEEP_MS = 5
"""A sleeping member is woken by a byte on its socket. A member that counts may not yet see that another has just
gone to sleep (a store may pass a later load); the sleeper then finds out by itself after this long."""
_MOST_VIEWS = 16


def can_share_memory() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")


class SharedExchange:
    """See `group.Exchange`. Waits actively for `spin_s`, then asleep."""

    def __init__(self, rank: int, pairs: Pairs, spin_s: float) -> None:
        size = len(pairs) + 1
        self._rank, self._size, self._pairs, self._spin_s = rank, size, pairs, spin_s
        self._peers = sorted(pairs)
        head_bytes = size * LINE_WORDS * _WORD_BYTES
        self._map = _shared_map(rank, pairs, head_bytes + 2 * size * PIECE_BYTES)
        self._words = np.frombuffer(self._map, np.int64, size * LINE_WORDS)
        self._floats = np.frombuffer(self._map, np.float32, offset=head_bytes).reshape(2, size, -1)
        slots = torch.frombuffer(self._map, dtype=torch.uint8, offset=head_bytes)
        self._slots = [list(half.view(size, PIECE_BYTES)) for half in slots.view(2, -1)]
        self._views: dict[tuple[torch.dtype, torch.Size], list[list[Tensor]]] = {}
        self._number = 0
        self._polls = {peer: select.poll() for peer in pairs}
        for peer, pair in pairs.items():
            self._polls[peer].register(pair, select.POLLIN)

    def total(self, mine: Tensor) -> Tensor:
        """In place of `mine`, where that is contiguous."""
        mine = mine.contiguous()
        elements = PIECE_BYTES // mine.element_size()
        if mine.dtype == torch.float32:
            mine_X = mine.numpy().reshape(-1)
            for start in range(0, len(mine_X), elements):
                self._add_fp32(mine_X[start : start + elements])
        else:
            for piece in mine.view(-1).split(elements):
                self._add(piece)
        return mine

    def collect(self, mine: Tensor, num_columns: list[int]) -> list[Tensor]:
        parts = [mine]
        if self._rank == 0:
            parts += [mine.new_empty(len(mine), columns) for columns in num_columns[1:]]
        flat = [part.view(-1) for part in parts]
        elements = PIECE_BYTES // mine.element_size()
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

    def _add_fp32(self, mine_X: np.ndarray) -> None:
        """One piece."""
        number = self._number
        state = exchange(self._words, self._floats, self._rank, number, _LOOKS, mine_X)
        if state == UNREAD:
            self._await_all(number)
            state = exchange(self._words, self._floats, self._rank, number, _LOOKS, mine_X)
        self._number += 1
        if state == UNSEEN:
            self._wake_sleepers()
            self._await_all(self._number)
            add_parts(self._floats, number % 2, mine_X)

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
        self._count()
        return parts

    def _read(self, pieces: list[Tensor]) -> None:
        """Takes the others' next piece, whatever length each has, and counts it only then."""
        self._await_all(self._number + 1)
        slots = self._slots[self._number % 2]
        for piece, slot in zip(pieces, slots[1:], strict=True):
            piece.copy_(slot[: piece.nbytes].view(piece.dtype))
        self._count()

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

    def _count(self) -> None:
        self._number += 1
        self._words[self._rank * LINE_WORDS] = self._number
        self._wake_sleepers()

    def _wake_sleepers(self) -> None:
        for peer in self._peers:
            if self._words[peer * LINE_WORDS + 1] == self._rank + 1:
                _wake(self._pairs[peer])

    def _await_all(self, number: int) -> None:
        for peer in self._peers:
            if self._words[peer * LINE_WORDS] < number:
                self._await(peer, number)

    def _await(self, peer: int, number: int) -> None:
        words, word = self._words, peer * LINE_WORDS
        stop_s = perf_counter() + self._spin_s
        while True:  # without yielding: on a busy machine that gives the core away for milliseconds
            if await_word(words, word, number, _LOOKS):
                return
            if perf_counter() >= stop_s:
                break
        words[self._rank * LINE_WORDS + 1] = peer + 1
        try:
            self._sleep_until(peer, number)
        finally:
            words[self._rank * LINE_WORDS + 1] = 0

    def _sleep_until(self, peer: int, number: int) -> None:
        word = peer * LINE_WORDS
        while self._words[word] < number:
            if self._polls[peer].poll(_SLEEP_MS) and not _drain(self._pairs[peer]):
                if self._words[word] >= number:  # counted, then closed
                    return
                raise PeerLostError(f"rank {peer} closed its socket")


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


def _wake(pair: socket.socket) -> None:
    """A full socket has wakes enough in it, and a closed one is noticed by who waits for its member."""
    try:
        pair.send(b"w", socket.MSG_DONTWAIT)
    except OSError:
        return


def _drain(pair: socket.socket) -> bool:
    """Takes the wakes; False where the other side has closed."""
    try:
        return bool(pair.recv(4096, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except OSError:
        return False
