"""Every transport does what `transport/protocol.py` says."""

import itertools
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conformance import CHECKS, Made, Make, take

from apportion.transport.links import Inbox, Outbox
from apportion.transport.tcp import TcpInbox, TcpOutbox
from apportion.transport.wire import Kind


def unix(folder: Path) -> Make:
    names = itertools.count()

    def make() -> Made:
        name = str(next(names))
        return Made(Inbox(folder, name), partial(Outbox, folder, name))

    return make


def tcp(_: Path) -> Make:
    def make() -> Made:
        inbox = TcpInbox()
        return Made(inbox, partial(TcpOutbox, inbox.address))

    return make


@pytest.mark.parametrize("transport", [unix, tcp], ids=["unix", "tcp"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_transport(check: Callable[[Make], None], transport: Callable[[Path], Make], tmp_path: Path):
    check(transport(tmp_path))


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 13, b"\xff" * 64, b"\x04"])
def test_who_speaks_something_else_is_shut_out_alone(sent: bytes):
    inbox = TcpInbox()
    host, _, port = inbox.address.rpartition(":")
    stranger = socket.create_connection((host, int(port)))
    stranger.sendall(sent)
    outbox = TcpOutbox(inbox.address)
    outbox.send(Kind.STEP, b"ours", b"payload")
    message = take(inbox)
    assert (message.header, bytes(message.payload)) == (b"ours", b"payload")
    stranger.close()
    assert inbox.receive(0.05) is None
    outbox.close()
    inbox.close()
