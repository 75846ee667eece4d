"""Clusters in a line: "tower: rtx-4090 + 2x rtx-3060-12gb; laptop: rtx-4060-laptop; link tower-laptop 1Gbit 0.3ms".

Hosts are parted by ";", devices by "+" or ",". A device is a GPU of the catalogue, "cpu", or without a host also a
"cuda:0" of this machine; before it may stand a count and a name, behind it its memory and a speed.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from apportion.catalog.cluster_rules import (
    Local,
    check_count,
    emulate,
    make_cluster,
    numbered,
    parse_memory,
    parse_speed,
)
from apportion.catalog.datasheet import (
    check_override,
    desktop_cpu,
    gpu_device,
    inside_bytes_per_s,
    torch_device,
)
from apportion.catalog.gpus import Gpu, find_gpu
from apportion.catalog.quantities import parse_bandwidth, parse_seconds
from apportion.types.cluster import LOCAL_HOST, Cluster, Device, Link
from apportion.types.errors import ClusterError

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
    """A device as written; `gpu` is None for a CPU and for a device of this machine. No host stands for this one."""

    place: str
    host: str | None
    what: str
    name: str | None
    memory: str | None
    speed: float
    gpu: Gpu | None

    @property
    def base_name(self) -> str:
        return self.name or (self.gpu.key if self.gpu else self.what.replace(":", ""))


def parse_groups(text: str, local: Local) -> Cluster:
    """Raises ClusterError naming the part that cannot be used."""
    parts = [part.strip() for part in text.split(";") if part.strip()]
    link_parts = [part for part in parts if re.match(r"link\s", part)]
    groups = [_host(part) for part in parts if part not in link_parts]
    _check_hosts([host for host, _ in groups])
    members = [member for host, listed in groups for member in _members(host, listed)]
    devices = _devices(members, local)
    links = [_link(part, [host for host, _ in groups if host]) for part in link_parts]
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
        gpu = None if what == "cpu" or is_local else find_gpu(what)
    except ClusterError as error:
        raise ClusterError(f"{place}: {error}; {EXAMPLES}") from None
    return _Member(
        place=place,
        host=host,
        what=what,
        name=match["name"],
        memory=match["memory"],
        speed=parse_speed(match["speed"], place),
        gpu=gpu,
    )


def _devices(members: Sequence[_Member], local: Local) -> list[Device]:
    check_count(len(members))
    cpus = Counter(member.host for member in members if member.what == "cpu")
    probed = any(member.gpu is None and member.host is None for member in members)
    found = local(max(1, cpus[None])) if probed else ()
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


def _device(member: _Member, name: str, found: Sequence[Device], num_cpus: int) -> Device:
    memory_bytes = parse_memory(member.memory, member.place) if member.memory else None
    if member.gpu is not None:
        device = gpu_device(member.gpu, name, member.host or LOCAL_HOST)
        if memory_bytes is None:
            return device
        memory_bytes = check_override(member.gpu, memory_bytes, member.place)
        return replace(device, memory_bytes=memory_bytes, reserved_bytes=0)
    if member.host is not None:
        if memory_bytes is None:
            raise ClusterError(f"{member.place}: give the memory of host '{member.host}', like cpu:16GiB")
        return desktop_cpu(name, member.host, memory_bytes, num_cpus)
    device = local_device(member.what, found, member.place)
    return replace(device, id=name, host=LOCAL_HOST, memory_bytes=memory_bytes or device.memory_bytes)


def local_device(torch_name: str, found: Sequence[Device], place: str) -> Device:
    """Raises ClusterError where this machine has no such device."""
    for device in found:
        if device.torch_device == torch_name:
            return device
    known = ", ".join(device.torch_device for device in found)
    raise ClusterError(f"{place}: this machine has no {torch_name}; it has {known}")


def _link(part: str, hosts: Sequence[str]) -> Link:
    place, words = f"--devices '{part}'", part.split()
    if len(words) != 4:
        raise ClusterError(f"{place}: {_LINK_EXAMPLE}")
    _, pair, bandwidth, latency = words
    ends = [(a, b) for a in hosts for b in hosts if pair == f"{a}-{b}"]
    if not ends:
        known = ", ".join(hosts) or "none, since no devices have a host name before them"
        raise ClusterError(f"{place}: '{pair}' are no two hosts joined by '-'; hosts: {known}")
    try:
        bytes_per_s, latency_s = parse_bandwidth(bandwidth), parse_seconds(latency)
    except ValueError as error:
        raise ClusterError(f"{place}: {error}; {_LINK_EXAMPLE}") from None
    return Link(src=ends[0][0], dst=ends[0][1], latency_s=latency_s, bytes_per_s=bytes_per_s)
