"""What holds of every cluster, however it was written."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TypeVar

from apportion.types.cluster import Cache, Cluster, Device, Link
from apportion.types.errors import ClusterError
from apportion.types.soundness import SLOWEST, device_faults
from apportion.types.units import format_bytes, parse_bytes

INTRA_HOST_LATENCY_S, INTRA_HOST_BYTES_PER_S = 6e-6, 3e9
"""An exchange between two processes through shared memory, as benchmarks/reductions.py prints it."""
HOP_S = 2e-4
"""Of a message of our own engine (benchmarks/hops.py): what one sequence's time per token has beyond the stages' own,
by the number of messages."""
MAX_DEVICES = 256
MAX_MEMORY_BYTES = 2**50

ASSUMED_LATENCY_S = 3e-4
"""Of a link between hosts where none is written: half a round trip of two programs through a switch at home, assumed;
`apportion probe --hosts` measures it."""
ASSUMED_LATENCY = f"a latency of {ASSUMED_LATENCY_S * 1e3:g} ms"

Figure = TypeVar("Figure", int, float)
Local = Callable[[int], Sequence[Device]]
"""This machine's devices, where so many CPU devices share its cores."""


def _no_cards() -> Sequence[str]:
    return ()


def _no_limit_bytes() -> int:
    return MAX_DEVICES * MAX_MEMORY_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """This machine: its cards as their driver calls them, and all of its memory; asked where it matters."""

    cards: Callable[[], Sequence[str]] = _no_cards
    memory_bytes: Callable[[], int] = _no_limit_bytes


NOWHERE = Here()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFigures:
    """None where nothing is said."""

    mem_bytes_per_s: float | None = None
    memory_bytes: int | None = None
    disk_bytes_per_s: float | None = None


def make_cluster(
    devices: Sequence[Device],
    links: Sequence[Link],
    inside_bytes_per_s: Mapping[str, float] | None = None,
    hosts: Mapping[str, HostFigures] | None = None,
) -> Cluster:
    """Checks names and adds the link inside each host where none is given, of `inside_bytes_per_s` by host. What
    `hosts` does not say of a host is the most that is known of one of its devices.

    Hosts without a link between them cannot hold neighbouring stages. Raises ClusterError.
    """
    if not devices:
        raise ClusterError("no devices; name at least one, like laptop=cpu:600MiB")
    check_count(len(devices))
    _refuse_repeated("device id", (device.id for device in devices))
    _refuse_repeated("link", (" – ".join(sorted((link.src, link.dst))) for link in links))
    for device in devices:
        for field, problem in device_faults(device):
            raise ClusterError(f"device {device.id!r}: {field}: {problem}")
        if device.memory_bytes > MAX_MEMORY_BYTES:
            most = format_bytes(MAX_MEMORY_BYTES)
            raise ClusterError(f"device {device.id} has more memory than {most}; write it like 6GiB")
    joined = {link.src for link in links if link.src == link.dst}
    known = inside_bytes_per_s or {}
    inside = [
        Link(
            src=host,
            dst=host,
            latency_s=INTRA_HOST_LATENCY_S,
            bytes_per_s=known.get(host, INTRA_HOST_BYTES_PER_S),
        )
        for host in dict.fromkeys(device.host for device in devices)
        if host not in joined
    ]
    given = hosts or {}
    return Cluster(
        devices=tuple(_on_host(device, devices, given.get(device.host, HostFigures())) for device in devices),
        links=tuple(of_engine(link, devices) for link in (*inside, *links)),
    )


def of_engine(link: Link, devices: Sequence[Device]) -> Link:
    """With the time of our own engine's messages where it would run: CPUs, and devices of this machine. What programs
    reach on GPUs of the catalogue includes theirs."""
    ours = {device.host for device in devices if device.kind == "cpu" or device.source == "measured"}
    return replace(link, hop_s=HOP_S) if ours & {link.src, link.dst} else link


def _on_host(device: Device, devices: Sequence[Device], given: HostFigures) -> Device:
    """With its host's figures; the rate of memory where its own is the host's: a CPU's, and a GPU's that the catalogue
    says it of."""
    here = [other for other in devices if other.host == device.host]
    device = replace(
        device,
        host_memory_bytes=given.memory_bytes or _most(other.host_memory_bytes for other in here),
        disk_bytes_per_s=given.disk_bytes_per_s or _most(other.disk_bytes_per_s for other in here),
    )
    if device.kind != "cpu" and device.host_bytes_per_s is None:
        return device
    host_bytes_per_s = given.mem_bytes_per_s or _most(other.host_bytes_per_s for other in here)
    return replace(device, host_bytes_per_s=host_bytes_per_s)


def _most(figures: Iterable[Figure | None]) -> Figure | None:
    """Of those that are known."""
    return max((figure for figure in figures if figure), default=None)


def _slower_stream(device: Device, speed: float) -> float | None:
    """A disk is as fast as it is."""
    if device.stream_bytes_per_s is None or device.stream_from == "disk":
        return device.stream_bytes_per_s
    return device.stream_bytes_per_s * speed


def _slower_cache(cache: Cache | None, speed: float) -> Cache | None:
    if cache is None:
        return None
    return replace(
        cache,
        read_bytes_per_s=cache.read_bytes_per_s * speed,
        copied_bytes_per_s=cache.copied_bytes_per_s * speed,
    )


def check_count(num_devices: int) -> None:
    """Raises ClusterError beyond `MAX_DEVICES`."""
    if num_devices > MAX_DEVICES:
        raise ClusterError(f"{num_devices} devices are more than the {MAX_DEVICES} that can be planned for")


def _refuse_repeated(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ClusterError(f"{what} '{name}' is given twice")
        seen.add(name)


def numbered(names: Sequence[str]) -> list[str]:
    """Names that occur more than once get a number: ["a", "b", "a"] -> ["a-1", "b", "a-2"]."""
    total, seen = Counter(names), Counter[str]()
    made: list[str] = []
    for name in names:
        seen[name] += 1
        made.append(f"{name}-{seen[name]}" if total[name] > 1 else name)
    return made


def emulate(device: Device, speed: float) -> Device:
    """The device at a share of its speed."""
    return replace(
        device,
        speed=device.speed * speed,
        mem_bytes_per_s=device.mem_bytes_per_s * speed,
        flops_per_s={name: rate * speed for name, rate in device.flops_per_s.items()},
        layer_overhead_s=device.layer_overhead_s / speed,
        step_overhead_s=device.step_overhead_s / speed,
        stream_bytes_per_s=_slower_stream(device, speed),
        cache=_slower_cache(device.cache, speed),
    )


def parse_speed(text: str | None, place: str) -> float:
    try:
        return check_speed(float(text or 1), place)
    except ValueError:
        raise ClusterError(f"{place}: speed '{text}' is not a number in (0, 1]") from None


def check_speed(speed: float, place: str) -> float:
    if not (isfinite(speed) and 0 < speed <= 1):
        raise ClusterError(f"{place}: speed {speed} is not in (0, 1]")
    if speed < SLOWEST:
        raise ClusterError(f"{place}: speed {speed:g} is below {SLOWEST:g}, the slowest that is emulated")
    return speed


def parse_memory(text: str, place: str) -> int:
    try:
        return parse_bytes(text)
    except (ValueError, OverflowError) as error:
        raise ClusterError(f"{place}: {error}") from None
