"""Links between coordinator and stages: one ZeroMQ message per hop, no rendezvous.

Each process binds one inbox and connects an outbox to every process it sends to, so a slow or dead receiver blocks
nobody else. Payload bytes are counted where they are sent. Every message says when it was sent, by the sender's
`time.perf_counter`: comparable on one host, where all processes read the same clock, and not across hosts.
"""

import struct
import time
from pathlib import Path
from typing import NamedTuple

import zmq

from apportion.parallel.wire import Kind

COORDINATOR = "coordinator"
LINGER_MS = 2000
"""How long a closing process goes on handing over what it sent last."""


def inbox_address(run_dir: Path, name: str) -> str:
    return f"ipc://{run_dir}/{name}"


_SENT = struct.Struct("<d")


class Message(NamedTuple):
    kind: Kind
    header: bytes
    payload: bytes
    sent_s: float


class Inbox:
    """Receives from any number of senders; messages of one sender stay in order."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, None after `timeout_s` without one."""
        if timeout_s is not None and not self._socket.poll(round(timeout_s * 1000)):
            return None
        kind, header, payload, sent = self._socket.recv_multipart()
        return Message(Kind(kind), header, payload, *_SENT.unpack(sent))

    def close(self) -> None:
        self._socket.close(linger=0)


class Outbox:
    """Sends to one inbox and counts the payload."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.sent_bytes = 0
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(address)

    def send(self, kind: Kind, header: bytes = b"", payload: bytes | memoryview = b"") -> None:
        self._socket.send_multipart([kind.value, header, payload, _SENT.pack(time.perf_counter())])
        self.sent_bytes += len(payload)

    def close(self) -> None:
        self._socket.close()
