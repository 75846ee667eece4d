"""The other side of a measurement: reads [size, answer size, data] and answers, until the peer ends.

As a program, over the socket given by number (host_rates.py); a listener calls `echo` (listen.py).
"""

import socket
import sys

MOST_BYTES = 2**24
_HEAD_BYTES = 8


def message(size: int, answer_size: int) -> bytes:
    return size.to_bytes(4, "little") + answer_size.to_bytes(4, "little") + bytes(size)


def receive(peer: socket.socket, size: int) -> bytes:
    """Exactly so many bytes; b"" where the peer ends before."""
    parts: list[bytes] = []
    while size:
        part = peer.recv(min(size, MOST_BYTES))
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def echo(peer: socket.socket) -> None:
    buffer = bytearray(MOST_BYTES)
    while head := receive(peer, _HEAD_BYTES):
        size, answer_size = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")
        if max(size, answer_size) > MOST_BYTES:
            return
        view, received = memoryview(buffer)[:size], 0
        while received < size:
            num = peer.recv_into(view[received:])
            if num == 0:
                return
            received += num
        peer.sendall(memoryview(buffer)[:answer_size])


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as end:
        echo(end)
