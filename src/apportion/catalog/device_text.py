"""Clusters in a line: "tower: rtx-4090 + 2x rtx-3060-12gb; laptop: rtx-4060-laptop; link tower-laptop 1Gbit 0.3ms".

Hosts are parted by ";", devices by "+" or ",". A device is a GPU or a computer of the catalogue, "cpu", or without a
host also a "cuda:0" of this machine; before it may stand a count and a name, behind it its memory and a speed.

Devices without a host are of one: this machine, unless it lacks a card that is named and none of its own is.
"""

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations

from apportion.catalog.cluster_rules import (
    ASSUMED_LATENCY,
    ASSUMED_LATENCY_S,
    Here,
    Local,
    check_count,
    emulate,
    make_cluster,
    numbered,
    parse_memory,
    parse_speed,
)
from apportion.catalog.datasheet import (
    DESKTOP,
    gpu_device,
    inside_bytes_per_s,
    processor_device,
    torch_device,
    with_memory,
)
from apportion.catalog.gpus import Gpu, find_device, find_gpu
from apportion.catalog.link_text import LinkFigures, read_figures, read_link, split_link
from apportion.catalog.processors import Processor
from apportion.types.cluster import LOCAL_HOST, Cluster, Device, Link
from apportion.types.errors import ClusterError
from apportion.types.units import format_bytes

EXAMPLES = "write it like laptop=cpu:600MiB, card=cuda:0:6GiB or rtx-4090 + 2x rtx-3060-12gb:10GiB"
_LINK_EXAMPLE = "write it like link tower-laptop 1Gbit 0.3ms"
_HOST = re.compile(r"(?P<host>[\w.-]+)\s*:\s*(?P<members>\S.*)")
_SIZE = re.compile(r"-?\d+(\.\d+)?\s*([kmgt]i?b?|b)\s*([@+,]|$)", re.IGNORECASE)
_OWN_COLON = ("cpu", "cuda")
"""What may itself be followed by a colon, and so cannot be a host."""
_PLUS = re.compile(r",|\s\+|\+(?![\s-])")
"""Not the plus of "Ryzen AI Max+ 395"."""
_MEMBER = re.compile(
    r"(?:(?P<count>\d+)\s?[x×]\s+|(?P<few>\d{1,2})[x×](?=\S))?"
    r"(?:(?P<name>[\w.-]+)\s*=\s*)?"
    r"(?P<what>cuda:\d+|[^:@=]+?)"
    r"(?:\s*:\s*(?P<memory>[^@:=]+?))?(?:\s*@\s*(?P<speed>[^@]+))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """A device as written; `of` is None for a CPU and for a device of this machine. Those without a host are of one."""

    place: str
    host: str | None
    what: str
    name: str | None
    memory: str | None
    speed: float
    of: Gpu | Processor | None

    @property
    def gpu(self) -> Gpu | None:
        return self.of if isinstance(self.of, Gpu) else None

    @property
    def base_name(self) -> str:
        return self.name or (self.of.key if self.of else self.what.replace(":", ""))


def parse_groups(text: str, local: Local, here: Here) -> Cluster:
    """Raises ClusterError naming the part that cannot be used."""
    parts = [part.strip() for part in text.split(";") if part.strip()]
    link_parts = [part for part in parts if re.match(r"link\s", part)]
    groups = [_host(part) for part in parts if part not in link_parts]
    _check_hosts([host for host, _ in groups])
    members = [member for host, listed in groups for member in _members(host, listed)]
    _check_computers(members)
    devices = _devices(members, local, here)
    links = _links(link_parts, [host for host, _ in groups if host])
    in_hosts = [(member.host or LOCAL_HOST, member.gpu) for member in members if member.gpu is not None]
    return make_cluster(devices, links, inside_bytes_per_s(in_hosts))


def _host(part: str) -> tuple[str | None, str]:
    match = _HOST.fullmatch(part)
    if match is None or match["host"].lower() in _OWN_COLON or _SIZE.match(match["members"]):
        return None, part
    return match["host"], match["members"]


def _check_hosts(hosts: Sequence[str | None]) -> None:
    if len(hosts) > 1 and None in hosts:
        raise ClusterError(
            "--devices: where there are several hosts each has a name before its devices, like tower: rtx-4090"
        )
    for host, count in Counter(hosts).items():
        if count > 1:
            raise ClusterError(f"--devices: host '{host}' is given twice; join its devices with +")


def _check_computers(members: Sequence[_Member]) -> None:
    """A computer is a host of its own."""
    computers = Counter(member.host for member in members if isinstance(member.of, Processor))
    for member in members:
        if computers[member.host] > 1 and isinstance(member.of, Processor):
            key = member.of.key
            raise ClusterError(
                f"{member.place}: each computer is a host of its own: write a: {key}; b: {key}; link a-b 1Gbit"
            )


def _members(host: str | None, listed: str) -> list[_Member]:
    members: list[_Member] = []
    for item in _PLUS.split(listed):
        place = f"--devices '{item.strip()}'"
        match = _MEMBER.fullmatch(item.strip())
        if match is None:
            raise ClusterError(f"{place}: {EXAMPLES}")
        count = int(match["count"] or match["few"] or 1)
        if count < 1:
            raise ClusterError(f"{place}: the count is not ≥ 1; {EXAMPLES}")
        check_count(len(members) + count)
        members += [_member(match, host, place)] * count
    return members


def _member(match: re.Match[str], host: str | None, place: str) -> _Member:
    what = match["what"].strip().lower()
    is_local = what.startswith("cuda:")
    if is_local and host is not None:
        raise ClusterError(
            f"{place}: {what} is a GPU of this machine, which has no host name here; name the GPU by its model"
        )
    try:
        of = None if what == "cpu" or is_local else find_device(what)
    except ClusterError as error:
        raise ClusterError(
            f"{place}: {error}" + ("" if str(error).endswith(("?", "write which")) else f"; {EXAMPLES}")
        ) from None
    return _Member(
        place=place,
        host=host,
        what=what,
        name=match["name"],
        memory=match["memory"],
        speed=parse_speed(match["speed"], place),
        of=of,
    )


def _devices(members: Sequence[_Member], local: Local, here: Here) -> list[Device]:
    check_count(len(members))
    cpus = Counter(member.host for member in members if member.what == "cpu")
    unnamed = [member for member in members if member.host is None]
    probed = [member for member in unnamed if member.of is None]
    found: Sequence[Device] = ()
    own_card = any(member.what != "cpu" for member in probed)
    if probed and (own_card or not lacks([member.of for member in unnamed if member.of], here)):
        check_memory([(member.memory, member.place) for member in probed if member.what == "cpu"], here)
        found = local(max(1, cpus[None]))
    used: Counter[tuple[str | None, str]] = Counter()
    devices: list[Device] = []
    for member, name in zip(members, numbered([member.base_name for member in members]), strict=True):
        device = _device(member, name, found, cpus[member.host])
        if member.gpu is not None:
            device = replace(
                device, torch_device=torch_device(member.gpu.kind, used[member.host, member.gpu.kind])
            )
            used[member.host, member.gpu.kind] += 1
        devices.append(emulate(device, member.speed))
    return devices


def lacks(named: Sequence[Gpu | Processor], here: Here) -> bool:
    """Whether these are of another machine: computers, and cards that this one's driver does not name."""
    if not named:
        return False
    own: Counter[str] = Counter()
    for name in here.cards():
        with suppress(ClusterError):
            own[find_gpu(name).key] += 1
    return bool(Counter(one.key for one in named) - own)


def check_memory(written: Sequence[tuple[str | None, str]], here: Here) -> None:
    """What is written for this machine's CPU devices, each with its place. Raises ClusterError for more than it has."""
    asked_bytes = sum(parse_memory(memory, place) for memory, place in written if memory)
    if asked_bytes > here.memory_bytes():
        raise ClusterError(
            f"--devices: {format_bytes(asked_bytes)} are asked of this machine's CPU, which has"
            f" {format_bytes(here.memory_bytes())} of memory; name another host, like tower: cpu:64GiB"
        )


def _device(member: _Member, name: str, found: Sequence[Device], num_cpus: int) -> Device:
    host = member.host or LOCAL_HOST
    memory_bytes = parse_memory(member.memory, member.place) if member.memory else None
    if isinstance(member.of, Gpu):
        device = gpu_device(member.of, name, host)
        return device if memory_bytes is None else with_memory(member.of, device, memory_bytes, member.place)
    if isinstance(member.of, Processor):
        return processor_device(member.of, name, host, memory_bytes)
    if member.host is not None or not found:
        if memory_bytes is None:
            raise ClusterError(f"{member.place}: give the memory of host '{host}', like cpu:16GiB")
        return processor_device(DESKTOP, name, host, memory_bytes, num_cpus)
    device = local_device(member.what, found, member.place)
    return replace(device, id=name, host=LOCAL_HOST, memory_bytes=memory_bytes or device.memory_bytes)


def local_device(torch_name: str, found: Sequence[Device], place: str) -> Device:
    """Raises ClusterError where this machine has no such device."""
    for device in found:
        if device.torch_device == torch_name:
            return device
    known = ", ".join(device.torch_device for device in found)
    raise ClusterError(f"{place}: this machine has no {torch_name}; it has {known}")


def _links(parts: Sequence[str], hosts: list[str]) -> list[Link]:
    """One without hosts is a network between all of those that have no link of their own."""
    links: list[Link] = []
    networks: list[tuple[str, str]] = []
    for part in parts:
        place, text = f"--devices '{part}'", re.sub(r"^link\s+", "", part)
        if not hosts:
            raise ClusterError(f"{place}: no devices have a host name before them, like tower: rtx-4090")
        if re.match(r"[\d.]", text) and split_link(text, hosts) is None:
            networks.append((part, text))
        else:
            src, dst, figures = read_link(place, text, hosts)
            links.append(_figured(src, dst, figures, place))
    if len(networks) > 1:
        raise ClusterError(
            f"--devices: there are two links without hosts, '{networks[0][0]}' and '{networks[1][0]}'"
        )
    joined = {frozenset((link.src, link.dst)) for link in links}
    for part, text in networks:
        place = f"--devices '{part}'"
        if len(hosts) < 2:
            raise ClusterError(f"{place}: a link without hosts is between hosts, and there is one")
        figures = read_figures(place, text)
        pairs = [pair for pair in combinations(hosts, 2) if frozenset(pair) not in joined]
        links += [_figured(src, dst, figures, place) for src, dst in pairs]
    return links


def _figured(src: str, dst: str, figures: LinkFigures, place: str) -> Link:
    if figures.bytes_per_s is None:
        raise ClusterError(f"{place}: {_LINK_EXAMPLE}")
    return link_of(src, dst, figures.bytes_per_s, figures.latency_s)


def link_of(src: str, dst: str, bytes_per_s: float, latency_s: float | None) -> Link:
    """With a latency that is assumed where none is said."""
    return Link(
        src=src,
        dst=dst,
        latency_s=ASSUMED_LATENCY_S if latency_s is None else latency_s,
        bytes_per_s=bytes_per_s,
        assumed=ASSUMED_LATENCY if latency_s is None else None,
    )
