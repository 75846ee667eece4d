"""The other side of host_rates.py: reads [size, answer size, data] from the socket given by number and answers."""

import socket
import sys


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as peer:
        buffer = bytearray(2**24)
        while head := peer.recv(8, socket.MSG_WAITALL):
            size, answer_size = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")
            view, received = memoryview(buffer)[:size], 0
            while received < size:
                received += peer.recv_into(view[received:])
            peer.sendall(view[:answer_size])


if __name__ == "__main__":
    main()
