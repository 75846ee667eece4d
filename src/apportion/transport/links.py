"""Links between coordinator and stages on one host: a packet a message, sent and received by the threads that compute.

Each process binds one inbox and connects an outbox to every process it sends to. A packet waits in the kernel until its
receiver asks for it, so a slow receiver blocks nobody, and what a process sent before it died still arrives. More than
some kilobytes lie in a segment of shared memory, which the packet names: the receiver frees it with its next call, and
the sender uses it again; the batches in flight bound how many there are. The sender writes it as a file, so that its
pages are the receiver's alone: what waits for a device is in that device's memory. With an I/O thread on either side,
as in ZeroMQ, a hop waits twice for a core: benchmarks/hops.py.

Payload bytes are counted where they are sent. Every message says when it was sent, by the sender's
`time.perf_counter`: comparable on one host, where all processes read the same clock, and not across hosts.
"""

import contextlib
import mmap
import os
import select
import socket
import struct
import time
import weakref
from pathlib import Path

from apportion.transport.protocol import Message
from apportion.transport.wire import Kind

COORDINATOR = "coordinator"

_HEAD = struct.Struct("<dIIQBI")
"""When it was sent; its generation; bytes of the header, of the payload and of the kind; number of the segment that
header and payload lie in, 0 where they follow."""
_INLINE_BYTES = 2 * 2**10
"""Small enough that a socket (Linux: 208 KiB) holds more packets than batches are ever in flight."""
_PACKET_BYTES = 4 * 2**10
_DATA = 64
"""Where a segment's data begins. Its first byte is 1 from writing to freeing."""
_BACKLOG = 128


class Inbox:
    """Receives from any number of senders; see `transport.Inbox`."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(run_dir / name))
        self._listener.listen(_BACKLOG)
        self._senders: dict[int, _Sender] = {}
        self._last: _Sender | None = None
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)
        self._poll.register(self._waker, select.POLLIN)

    def wake(self) -> None:
        os.eventfd_write(self._waker, 1)

    def receive(self, timeout_s: float | None = None) -> Message | None:
        if self._last is not None:
            self._last.free()
        timeout_ms = None if timeout_s is None else round(timeout_s * 1000)
        woken = False
        while not woken and (ready := self._poll.poll(timeout_ms)):
            for descriptor, _ in ready:
                if descriptor == self._waker:
                    woken = bool(os.eventfd_read(self._waker))
                    continue
                if descriptor == self._listener.fileno():
                    self._accept()
                    continue
                self._last = self._senders[descriptor]
                if (message := self._last.take()) is not None:
                    return message
                self._forget(descriptor)
        return None

    def close(self) -> None:
        for descriptor in list(self._senders):
            self._forget(descriptor)
        self._listener.close()
        os.close(self._waker)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._senders[connection.fileno()] = _Sender(connection)
        self._poll.register(connection, select.POLLIN)

    def _forget(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        self._senders.pop(descriptor).connection.close()


class _Sender:
    """The receiving end of a connection, with the segments that came through it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._segments: list[_ReceivedSegment] = []
        self._taken: mmap.mmap | None = None

    def take(self) -> Message | None:
        """None where the other side has closed."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self.connection, _PACKET_BYTES, 1)
        except ConnectionError:
            return None
        if not packet:
            return None
        for descriptor in descriptors:
            self._segments.append(_ReceivedSegment(descriptor))
        sent_s, generation, header_bytes, payload_bytes, kind_bytes, number = _HEAD.unpack_from(packet)
        kind_stop = _HEAD.size + kind_bytes
        stop = header_bytes + payload_bytes
        self._taken = self._segments[number - 1].holding(_DATA + stop) if number else None
        body = memoryview(packet)[kind_stop:] if self._taken is None else memoryview(self._taken)[_DATA:]
        kind = Kind(packet[_HEAD.size : kind_stop])
        return Message(kind, generation, bytes(body[:header_bytes]), body[header_bytes:stop], sent_s)

    def free(self) -> None:
        if self._taken is not None:
            self._taken[0] = 0
            self._taken = None


class _ReceivedSegment:
    """The receiving end: as much of it is mapped as any message took."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._mapped = mmap.mmap(descriptor, 0)

    def holding(self, num_bytes: int) -> mmap.mmap:
        if len(self._mapped) < num_bytes:
            self._mapped = mmap.mmap(self._descriptor, 0)
        return self._mapped


class Outbox:
    """Sends to one inbox and counts the payload; see `transport.Outbox`."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self.sent_bytes = self.generation = 0
        self._path = str(run_dir / name)
        self._connection: socket.socket | None = None
        self._segments: list[_Segment] = []

    def send(self, kind: Kind, header: bytes = b"", payload: bytes | memoryview = b"") -> None:
        self.sent_bytes += len(payload)
        number, descriptors = 0, []
        sent_s = time.perf_counter()
        body = [header, payload]
        if len(header) + len(payload) > _INLINE_BYTES:
            number, descriptors = self._fill(header, payload)
            body = []
        head = _HEAD.pack(sent_s, self.generation, len(header), len(payload), len(kind.value), number)
        with contextlib.suppress(ConnectionError, FileNotFoundError):
            socket.send_fds(self._connected(), [head, kind.value, *body], descriptors)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _connected(self) -> socket.socket:
        if self._connection is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(self._path)
            except OSError:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _fill(self, header: bytes, payload: bytes | memoryview) -> tuple[int, list[int]]:
        """The number of the segment that now holds both, and its descriptor where the receiver has not seen it yet."""
        index = next((i for i, segment in enumerate(self._segments) if segment.is_free), len(self._segments))
        if is_new := index == len(self._segments):
            self._segments.append(_Segment())
        self._segments[index].write(header, payload)
        return index + 1, [self._segments[index].descriptor] if is_new else []


class _Segment:
    """The sending end: of its memory only the page with the first byte is mapped."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("apportion-link")
        weakref.finalize(self, os.close, self.descriptor)
        self._grow(mmap.PAGESIZE)
        self._state = mmap.mmap(self.descriptor, mmap.PAGESIZE)

    @property
    def is_free(self) -> bool:
        return not self._state[0]

    def write(self, header: bytes, payload: bytes | memoryview) -> None:
        stop = _DATA + len(header) + len(payload)
        if stop > self._num_bytes:
            self._grow(1 << (stop - 1).bit_length())
        written = os.pwritev(self.descriptor, [header, payload], _DATA)
        assert written == len(header) + len(payload)
        self._state[0] = 1

    def _grow(self, num_bytes: int) -> None:
        """Of the file; its pages are there once they are written."""
        os.ftruncate(self.descriptor, num_bytes)
        self._num_bytes = num_bytes
