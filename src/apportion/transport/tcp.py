"""Links over TCP, between processes that need not share a host: a stream of frames for every sender.

A frame is a head of fixed size, then kind, header and payload. Sending writes to the socket at once as much as that
takes; the rest of a frame, and whatever follows it, goes to a thread, so that a slow receiver blocks nobody. No frame
says when it was sent, as two hosts have two clocks. As yet without keys and encryption, so for loopback alone.
"""

import contextlib
import select
import socket
import struct
from collections import deque
from threading import Condition, Thread

from apportion.transport.protocol import Message
from apportion.transport.wire import Kind

_HEAD = struct.Struct("<BIIQ")
"""Bytes of the kind; its generation; bytes of the header and of the payload."""
_MOST_KIND_BYTES = max(len(kind.value) for kind in Kind)
MOST_HEADER_BYTES, MOST_PAYLOAD_BYTES = 2**26, 2**34
"""A head that says more is no head of ours."""
_BACKLOG = 128
_CONNECT_S = 10.0
LOOPBACK = "127.0.0.1"


class TcpInbox:
    """Receives from any number of senders; see `transport.Inbox`."""

    def __init__(self, host: str = LOOPBACK, port: int = 0) -> None:
        self._listener = socket.create_server((host, port), backlog=_BACKLOG)
        self._listener.setblocking(False)
        bound_host, bound_port = self._listener.getsockname()[:2]
        self.address = f"{bound_host}:{bound_port}"
        self._senders: dict[int, _Frames] = {}
        self._waker, self._waking = socket.socketpair()
        self._waker.setblocking(False)
        self._waking.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)
        self._poll.register(self._waker, select.POLLIN)

    def receive(self, timeout_s: float | None = None) -> Message | None:
        timeout_ms = None if timeout_s is None else round(timeout_s * 1000)
        woken = False
        while not woken and (ready := self._poll.poll(timeout_ms)):
            for descriptor, _ in ready:
                if descriptor == self._waker.fileno():
                    woken = self._slept()
                elif descriptor == self._listener.fileno():
                    self._accept()
                elif (message := self._take(descriptor)) is not None:
                    return message
        return None

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is awake enough
            self._waking.send(b"\0")

    def close(self) -> None:
        for descriptor in list(self._senders):
            self._forget(descriptor)
        for one in (self._listener, self._waker, self._waking):
            one.close()

    def _slept(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while self._waker.recv(4096):
                pass
        return True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it may have given up meanwhile
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._senders[connection.fileno()] = _Frames(connection)
            self._poll.register(connection, select.POLLIN)

    def _take(self, descriptor: int) -> Message | None:
        """A frame that is complete now. A sender that is gone, or sends no frames, is forgotten."""
        sender = self._senders[descriptor]
        try:
            return sender.take()
        except BlockingIOError:
            return None
        except (ConnectionError, ValueError):
            self._forget(descriptor)
            return None

    def _forget(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        self._senders.pop(descriptor).connection.close()


class _Frames:
    """The frames of one connection, of which the next may have come in part."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._head = memoryview(bytearray(_HEAD.size))
        self._body = memoryview(bytearray(0))
        self._wanted: memoryview = self._head
        """What has not come yet of head or body."""
        self._lengths: tuple[int, int, int] | None = None
        """Those in the head, once it is here."""
        self._generation = 0

    def take(self) -> Message:
        """Raises BlockingIOError until the frame is complete, ConnectionError at the end, ValueError for no frame."""
        if self._lengths is None:
            self._fill()
            kind_bytes, self._generation, *lengths = _HEAD.unpack(self._head)
            self._lengths = self._checked(kind_bytes, *lengths)
            self._wanted = self._of_body(sum(self._lengths))
        self._fill()
        kind_bytes, header_bytes, payload_bytes = self._lengths
        self._lengths, self._wanted = None, self._head
        kind = Kind(bytes(self._body[:kind_bytes]))
        start = kind_bytes + header_bytes
        header = bytes(self._body[kind_bytes:start])
        return Message(kind, self._generation, header, self._body[start : start + payload_bytes], None)

    def _fill(self) -> None:
        while len(self._wanted):
            count = self.connection.recv_into(self._wanted)
            if not count:
                raise ConnectionResetError
            self._wanted = self._wanted[count:]

    def _checked(self, kind_bytes: int, header_bytes: int, payload_bytes: int) -> tuple[int, int, int]:
        if (
            kind_bytes > _MOST_KIND_BYTES
            or header_bytes > MOST_HEADER_BYTES
            or payload_bytes > MOST_PAYLOAD_BYTES
        ):
            raise ValueError("no frame")
        return kind_bytes, header_bytes, payload_bytes

    def _of_body(self, num_bytes: int) -> memoryview:
        """The same memory for every message, as long as it is large enough."""
        if len(self._body) < num_bytes:
            self._body = memoryview(bytearray(num_bytes))
        return self._body[:num_bytes]


class TcpOutbox:
    """Sends to one inbox and counts the payload; see `transport.Outbox`."""

    def __init__(self, address: str) -> None:
        self.sent_bytes = self.generation = 0
        host, _, port = address.rpartition(":")
        self._to = (host, int(port))
        self._connection: socket.socket | None = None
        self._late: _LateSender | None = None

    def send(self, kind: Kind, header: bytes = b"", payload: bytes | memoryview = b"") -> None:
        self.sent_bytes += len(payload)
        head = _HEAD.pack(len(kind.value), self.generation, len(header), len(payload)) + kind.value + header
        with contextlib.suppress(OSError):
            connection = self._connected()
            if self._late is not None and self._late.is_behind:
                self._late.put(head + bytes(payload))
                return
            num_sent = _send_now(connection, [head, payload])
            if num_sent < len(head) + len(payload):
                self._late = self._late or _LateSender(connection)
                rest = memoryview(payload)[max(0, num_sent - len(head)) :]
                self._late.put(head[num_sent:] + bytes(rest))

    def close(self) -> None:
        """What is still to be sent is sent first, where the receiver takes it in."""
        if self._late is not None:
            self._late.close()
        if self._connection is not None:
            self._connection.close()

    def _connected(self) -> socket.socket:
        if self._connection is None:
            self._connection = socket.create_connection(self._to, timeout=_CONNECT_S)
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connection.setblocking(False)
        return self._connection


class _LateSender:
    """A thread that sends what the socket did not take at once, in order."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._waiting: deque[bytes] = deque()
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_behind(self) -> bool:
        return bool(self._waiting)

    def put(self, data: bytes) -> None:
        with self._changed:
            self._waiting.append(data)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_CONNECT_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                data = memoryview(self._waiting[0])
            if not self._send_all(data):
                return
            with self._changed:
                self._waiting.popleft()

    def _send_all(self, data: memoryview) -> bool:
        """False where the receiver is gone, or does not take anything while this end is closed."""
        while data:
            if not select.select([], [self._connection], [], _CONNECT_S)[1]:
                if self._closed:
                    return False
                continue
            try:
                data = data[self._connection.send(data) :]
            except OSError:
                return False
        return True


def _send_now(connection: socket.socket, parts: list[bytes | memoryview]) -> int:
    """How many of the bytes the socket has taken without waiting."""
    try:
        return connection.sendmsg(parts)
    except BlockingIOError:
        return 0
