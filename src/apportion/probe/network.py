"""What other machines that run `apportion probe --listen` can do, and the links between all of them.

A connection carries one request: "machine", "echo" (then raw bytes to measure by), or "link" to a third machine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from apportion.probe.channel import Address, Channel, check_key, connect, is_loopback
from apportion.probe.echo import MOST_BYTES
from apportion.probe.host_rates import SMALL_BYTES, LinkRates, round_trips_s
from apportion.probe.machine import Machine
from apportion.types.cluster import LOCAL_HOST
from apportion.types.errors import ClusterError

ROUND_TRIPS = 200
FIRST_BYTES = 2**17
LONG_ENOUGH_S = 0.25
"""Of one transfer: messages grow until they take so long, or are as large as the other side takes."""
TRANSFERS = 4
REPLY_S = 180.0
"""Longest wait for another machine to measure itself."""

Answer = TypeVar("Answer")

MACHINE: TypeAdapter[Machine] = TypeAdapter(Machine)
LINK_RATES: TypeAdapter[LinkRates] = TypeAdapter(LinkRates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """`machines` and `links` by host's name, this machine's being "local"; `missing` says why a link has no rates."""

    machines: Mapping[str, Machine]
    links: Mapping[tuple[str, str], LinkRates]
    missing: Mapping[tuple[str, str], str]


def num_steps(num_hosts: int) -> int:
    """How often `probe_network` calls `begin`."""
    return num_hosts + num_hosts * (num_hosts + 1) // 2


def probe_network(hosts: Mapping[str, Address], key: str, begin: Callable[[str], object]) -> Network:
    """`begin` is told what comes next. Raises ClusterError for a host that cannot be asked, UsageError for no key."""
    machines: dict[str, Machine] = {}
    for name, address in hosts.items():
        begin(f"the devices of {name}")
        machines[name] = _ask_machine(name, address, key)
    links: dict[tuple[str, str], LinkRates] = {}
    missing: dict[tuple[str, str], str] = {}
    for name, address in hosts.items():
        begin(f"the link to {name}")
        links[LOCAL_HOST, name] = _asked(name, address, key, lambda channel: channel_rates(channel))
    for src, dst in combinations(hosts, 2):
        begin(f"the link from {src} to {dst}")
        found = _asked(src, hosts[src], key, lambda channel, to=hosts[dst]: _ask_link(channel, to))
        if isinstance(found, str):
            missing[src, dst] = found
        else:
            links[src, dst] = found
    return Network(machines=machines, links=links, missing=missing)


def _asked(name: str, address: Address, key: str, ask: Callable[[Channel], Answer]) -> Answer:
    """Raises ClusterError."""
    place = f"{name} at {address[0]}:{address[1]}"
    if not is_loopback(address[0]):
        check_key(key, f"asking {place}")
    try:
        channel = connect(address, key)
        with channel.peer:
            channel.peer.settimeout(REPLY_S)
            return ask(channel)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ClusterError(
            f"cannot measure {place} ({reason}); run `apportion probe --listen` there, with the same key"
        ) from None


def _ask_machine(name: str, address: Address, key: str) -> Machine:
    def ask(channel: Channel) -> object:
        channel.send({"ask": "machine"})
        return channel.receive()

    try:
        return MACHINE.validate_python(_asked(name, address, key, ask))
    except ValidationError:
        raise ClusterError(f"{name} runs another version of apportion; use one on both") from None


def _ask_link(channel: Channel, to: Address) -> LinkRates | str:
    """The other machine measures it; a string says why it could not."""
    channel.send({"ask": "link", "host": to[0], "port": to[1]})
    answer = channel.receive()
    return str(answer["error"]) if "error" in answer else LINK_RATES.validate_python(answer)


def measure_link(address: Address, key: str) -> LinkRates:
    """From this machine. Raises OSError."""
    channel = connect(address, key)
    with channel.peer:
        channel.peer.settimeout(REPLY_S)
        return channel_rates(channel)


def channel_rates(channel: Channel) -> LinkRates:
    """One way: half a round trip of `SMALL_BYTES`, and the slower direction's rate without it."""
    channel.send({"ask": "echo"})
    peer = channel.peer
    round_trip_s = median(round_trips_s(peer, SMALL_BYTES, SMALL_BYTES, ROUND_TRIPS))
    size = FIRST_BYTES
    while size < MOST_BYTES and round_trips_s(peer, size, 1, 1)[0] < LONG_ENOUGH_S:
        size *= 2
    there = min(round_trips_s(peer, size, 1, TRANSFERS))
    back = min(round_trips_s(peer, 0, size, TRANSFERS))
    slower_s = max(there, back)
    return LinkRates(
        latency_s=round_trip_s / 2, bytes_per_s=size / max(slower_s - round_trip_s, slower_s / 2)
    )
