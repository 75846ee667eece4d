"""One connection between two machines that share a key: both prove that they have it, then send signed messages.

The key itself never travels. Each side answers the other's nonce with an HMAC (RFC 2104) of both, and every message
carries one under a key of that connection. Messages are signed, not hidden: they hold rates of hardware, no secrets.
"""

import hmac
import ipaddress
import json
import secrets
import socket
from typing import Any

from apportion.probe.echo import receive
from apportion.types.errors import ClusterError, UsageError
from apportion.types.json_text import parse_json

DEFAULT_PORT = 7453
MIN_KEY_CHARACTERS = 16
MOST_MESSAGE_BYTES = 2**16
HANDSHAKE_S = 5.0
ANSWER_S = 15.0
"""A listener takes one peer at a time: silent ones before us keep it for HANDSHAKE_S each."""
_MAGIC = b"apportion probe 1\n"
_NONCE_BYTES = _MAC_BYTES = 32

Address = tuple[str, int]


class KeyMismatchError(ConnectionError):
    pass


class Channel:
    """Signed JSON messages over a socket; `role` is "client" or "server"."""

    def __init__(self, peer: socket.socket, key: bytes, role: str) -> None:
        self.peer = peer
        self._key = key
        self._ours, self._theirs = (b"client", b"server") if role == "client" else (b"server", b"client")
        self._sent = self._received = 0

    def send(self, message: object) -> None:
        content = json.dumps(message).encode()
        self.peer.sendall(
            len(content).to_bytes(4, "little") + self._mac(self._ours, self._sent, content) + content
        )
        self._sent += 1

    def receive(self) -> Any:
        """Raises ConnectionError for what is not signed."""
        head = receive(self.peer, 4 + _MAC_BYTES)
        size = int.from_bytes(head[:4], "little")
        if not head or size > MOST_MESSAGE_BYTES:
            raise ConnectionError("the other side ended")
        content = receive(self.peer, size)
        if not hmac.compare_digest(head[4:], self._mac(self._theirs, self._received, content)):
            raise ConnectionError("a message was altered on its way")
        self._received += 1
        return parse_json(content)

    def _mac(self, sender: bytes, number: int, content: bytes) -> bytes:
        return _hmac(self._key, sender, number.to_bytes(8, "little"), content)


def connect(address: Address, key: str) -> Channel:
    """Raises OSError, of which KeyMismatchError where the keys differ."""
    peer = socket.create_connection(address, ANSWER_S)
    try:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ours = secrets.token_bytes(_NONCE_BYTES)
        peer.sendall(_MAGIC + ours)
        answer = receive(peer, _NONCE_BYTES + _MAC_BYTES)
        if not answer:
            raise ConnectionError("the other side is no `apportion probe --listen`")
        theirs, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
        if not hmac.compare_digest(proof, _hmac(key.encode(), b"server proves", ours, theirs)):
            raise KeyMismatchError("the keys differ")
        peer.sendall(_hmac(key.encode(), b"client proves", ours, theirs))
    except BaseException:
        peer.close()
        raise
    return Channel(peer, _hmac(key.encode(), b"connection", ours, theirs), "client")


def accept(peer: socket.socket, key: str) -> Channel:
    """The other side of `connect`. Raises OSError."""
    peer.settimeout(HANDSHAKE_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    asked = receive(peer, len(_MAGIC) + _NONCE_BYTES)
    if not asked.startswith(_MAGIC):
        raise ConnectionError("it is no apportion probe")
    theirs, ours = asked[len(_MAGIC) :], secrets.token_bytes(_NONCE_BYTES)
    peer.sendall(ours + _hmac(key.encode(), b"server proves", theirs, ours))
    proof = receive(peer, _MAC_BYTES)
    if not hmac.compare_digest(proof, _hmac(key.encode(), b"client proves", theirs, ours)):
        raise KeyMismatchError("its key differs")
    return Channel(peer, _hmac(key.encode(), b"connection", theirs, ours), "server")


def _hmac(key: bytes, *parts: bytes) -> bytes:
    """Parts have fixed lengths but for the last."""
    return hmac.digest(key, b"".join(parts), "sha256")


def parse_address(text: str) -> Address:
    """`10.0.0.3`, `tower.lan:7000`, `[fe80::1]:7000`. Raises UsageError."""
    host, bracket, rest = text.strip().removeprefix("[").partition("]")
    if not bracket:
        host, _, rest = text.strip().partition(":")
        rest = f":{rest}" if rest else ""
    port = rest.removeprefix(":") or str(DEFAULT_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UsageError(f"'{text}' is no address; write it like 10.0.0.3 or tower.lan:{DEFAULT_PORT}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches it. Raises ClusterError for a name that nobody knows."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError as error:
        raise ClusterError(f"host '{host}' is not known ({error.strerror}); give its address") from None
    return all(ipaddress.ip_address(str(entry[4][0]).split("%")[0]).is_loopback for entry in found)


def check_key(key: str, why: str) -> None:
    """Raises UsageError."""
    if len(key) < MIN_KEY_CHARACTERS:
        raise UsageError(
            f"{why} needs --key-file (or APPORTION_KEY) of at least {MIN_KEY_CHARACTERS} characters"
        )
