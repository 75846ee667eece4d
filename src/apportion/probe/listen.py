"""`apportion probe --listen`: measures this machine, and answers its peers' messages, for who has the key."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from apportion.probe.channel import Address, Channel, accept, check_key, is_loopback
from apportion.probe.echo import echo
from apportion.probe.machine import probe_machine
from apportion.probe.network import LINK_RATES, MACHINE, measure_link
from apportion.types.errors import ClusterError

IDLE_S = 30.0
"""A peer that says nothing for so long is left."""


@contextmanager
def listening(address: Address, key: str) -> Iterator[socket.socket]:
    """Raises UsageError for an address that others reach and no key, ClusterError where it cannot be had."""
    host, port = address
    if not is_loopback(host):
        check_key(key, f"listening on {host}, which other machines reach,")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ClusterError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    with server:
        yield server


def serve(server: socket.socket, key: str, tell: Callable[[str], object]) -> None:
    """For ever, one peer at a time: measurements do not disturb each other."""
    while True:
        peer, (host, *_) = server.accept()
        with peer:
            try:
                _answer(accept(peer, key), key, lambda what, host=host: tell(f"{host}: {what}"))
            except (OSError, ValueError, KeyError, TypeError) as error:
                tell(f"{host}: refused or ended ({error})")


def _answer(channel: Channel, key: str, tell: Callable[[str], object]) -> None:
    channel.peer.settimeout(IDLE_S)
    request = channel.receive()
    match request["ask"]:
        case "machine":
            tell("measuring this machine")
            channel.send(MACHINE.dump_python(probe_machine(lambda _: None), mode="json"))
        case "echo":
            tell("measuring the link")
            echo(channel.peer)
        case "link":
            address = (str(request["host"]), int(request["port"]))
            tell(f"measuring the link to {address[0]}:{address[1]}")
            channel.send(_link(address, key))
        case asked:
            raise ValueError(f"it asks for '{asked}'")


def _link(address: Address, key: str) -> object:
    try:
        return LINK_RATES.dump_python(measure_link(address, key), mode="json")
    except OSError as error:
        return {"error": error.strerror or str(error) or type(error).__name__}
