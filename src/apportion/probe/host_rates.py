"""What this machine's memory copies, and what two of its processes send each other over sockets."""

import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from apportion.probe.cpu_rates import MEASURE_S, READ_BYTES
from apportion.probe.echo import MOST_BYTES, message, receive
from apportion.types.children import python
from apportion.types.stopwatch import best_s

ROUND_TRIPS = 500
SMALL_BYTES = 4096
"""About the hidden states of one token."""
LARGE_BYTES = MOST_BYTES
LARGE_ROUNDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRates:
    """One way: half a round trip of `SMALL_BYTES`, and the rate of `LARGE_BYTES`."""

    latency_s: float
    bytes_per_s: float


def copy_bytes_per_s() -> float:
    """Bytes copied per second by one thread; each is read once and written once."""
    source = np.ones(READ_BYTES // 8)
    target = np.empty_like(source)
    return READ_BYTES / best_s(lambda: np.copyto(target, source), MEASURE_S)


def unix_socket_rates() -> LinkRates:
    """The exchange inside a tensor-parallel group."""
    ours, theirs = socket.socketpair()
    return _rates(ours, theirs)


def loopback_rates() -> LinkRates:
    """TCP through 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    for end in (ours, theirs):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _rates(ours, theirs)


def _rates(ours: socket.socket, theirs: socket.socket) -> LinkRates:
    command = python(str(Path(__file__).with_name("echo.py")), str(theirs.fileno()))
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]):
        theirs.close()
        small = round_trips_s(ours, SMALL_BYTES, SMALL_BYTES, ROUND_TRIPS)
        large = round_trips_s(ours, LARGE_BYTES, 1, LARGE_ROUNDS)
        ours.shutdown(socket.SHUT_WR)  # the other side ends
    return LinkRates(latency_s=median(small) / 2, bytes_per_s=LARGE_BYTES / min(large))


def round_trips_s(peer: socket.socket, size: int, answer_size: int, num: int) -> list[float]:
    """Seconds of each; the peer runs `echo`. Raises ConnectionError where it ends."""
    asked = message(size, answer_size)
    times: list[float] = []
    for _ in range(num):
        begun_s = perf_counter()
        peer.sendall(asked)
        if not receive(peer, answer_size):
            raise ConnectionError("the other side ended")
        times.append(perf_counter() - begun_s)
    return times
