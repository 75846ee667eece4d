"""Devices and links as people write them: `--devices "laptop=cpu:600MiB@0.5, card=cuda:0"` or a TOML file.

`local` are the devices of this machine as probed: a written device takes its rates from the one it names. An
emulated device (`@speed` below 1) computes at that share of the rates, with overhead longer by as much.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from math import isfinite
from pathlib import Path
from typing import cast

from apportion.catalog.toml_table import TomlTable
from apportion.types.cluster import Cluster, Device, DeviceKind, Link
from apportion.types.errors import ClusterError
from apportion.types.units import FORMAT_BYTES, parse_bytes

LOCAL_HOST = "local"
INTRA_HOST_LATENCY_S = 3e-5
"""An exchange between two processes over Unix sockets, as benchmarks/reductions.py prints it."""
INTRA_HOST_BYTES_PER_S = 1.5e9
_DEVICE = re.compile(
    r"(?P<id>[\w.+-]+)=(?P<torch>cpu|cuda:\d+)(?::(?P<memory>[^@:]+))?(?:@(?P<speed>[^@]+))?"
)


Local = Callable[[int], Sequence[Device]]
"""This machine's devices, where so many CPU devices share its cores."""


def parse_devices(text: str, local: Local) -> Cluster:
    """The devices of one host, as on the command line. Raises ClusterError."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    found = local(max(1, sum("=cpu" in item for item in items)))
    return make_cluster([_parse_device(item, found) for item in items], [])


def _parse_device(item: str, local: Sequence[Device]) -> Device:
    place = f"--devices '{item}'"
    match = _DEVICE.fullmatch(item)
    if match is None:
        raise ClusterError(
            f"{place}: write it like laptop=cpu:600MiB, slow=cpu:600MiB@0.5 or card=cuda:0:6GiB"
        )
    found = next((device for device in local if device.torch_device == match["torch"]), None)
    if found is None:
        known = ", ".join(device.torch_device for device in local)
        raise ClusterError(f"{place}: this machine has no {match['torch']}; it has {known}")
    try:
        memory_bytes = parse_bytes(match["memory"]) if match["memory"] else found.memory_bytes
    except ValueError as error:
        raise ClusterError(f"{place}: {error}") from None
    named = replace(found, id=match["id"], host=LOCAL_HOST, memory_bytes=memory_bytes)
    return emulate(named, _parse_speed(match["speed"], place))


def _parse_speed(text: str | None, place: str) -> float:
    try:
        return _check_speed(float(text or 1), place)
    except ValueError:
        raise ClusterError(f"{place}: speed '{text}' is not a number in (0, 1]") from None


def _check_speed(speed: float, place: str) -> float:
    if not (isfinite(speed) and 0 < speed <= 1):
        raise ClusterError(f"{place}: speed {speed} is not in (0, 1]")
    return speed


def emulate(device: Device, speed: float) -> Device:
    """The device at a share of its speed."""
    return replace(
        device,
        speed=device.speed * speed,
        mem_bytes_per_s=device.mem_bytes_per_s * speed,
        flops_per_s={name: rate * speed for name, rate in device.flops_per_s.items()},
        layer_overhead_s=device.layer_overhead_s / speed,
        step_overhead_s=device.step_overhead_s / speed,
    )


def read_cluster_toml(path: Path, local: Local) -> Cluster:
    """Devices of several hosts and the links between them. `local` is called only where a rate is not given.

    Raises ClusterError naming the place.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"cannot read cluster {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ClusterError(f"{path} is not TOML: {error}") from None
    table = TomlTable(str(path), content)
    tables = table.tables("device", "device")
    found = cache(lambda: local(len(tables)))
    devices = [_read_device(one, found) for one in tables]
    links = [_read_link(one, {device.host for device in devices}) for one in table.tables("link", "link")]
    table.finish()
    return make_cluster(devices, links)


def _read_device(table: TomlTable, local: Callable[[], Sequence[Device]]) -> Device:
    device_id = table.text("id")
    table.place += f" ({device_id})"
    host = table.text("host", LOCAL_HOST)
    kind = cast(DeviceKind, table.choice("kind", ("cpu", "cuda"), "cpu"))
    torch_device = table.text("torch_device", "cpu" if kind == "cpu" else "cuda:0")
    if re.fullmatch(r"cpu" if kind == "cpu" else r"cuda:\d+", torch_device) is None:
        raise ClusterError(f"{table.place}: torch_device: '{torch_device}' is no {kind} device")
    rates = ("mem_bytes_per_s", "flops_per_s", "layer_overhead_s", "step_overhead_s")
    given = all(table.has(rate) for rate in rates)
    like = None if given else _local_device(torch_device, local(), table.place)
    speed = _check_speed(table.number("speed", 1.0), table.place)
    memory_bytes = table.size_bytes("memory", like and like.memory_bytes)
    device = Device(
        id=device_id,
        host=host,
        kind=kind,
        torch_device=torch_device,
        memory_bytes=memory_bytes,
        reserved_bytes=table.size_bytes("reserved", 0, zero_allowed=True),
        mem_bytes_per_s=table.number("mem_bytes_per_s", like and like.mem_bytes_per_s),
        flops_per_s=_flops(table, like),
        layer_overhead_s=table.number("layer_overhead_s", like and like.layer_overhead_s, zero_allowed=True),
        step_overhead_s=table.number("step_overhead_s", like and like.step_overhead_s, zero_allowed=True),
        num_threads=table.count("num_threads", like.num_threads if like else 1),
        host_cores=like and like.host_cores,
        speed=1.0,
        source="datasheet" if like is None else like.source,
    )
    if device.usable_bytes <= 0:
        raise ClusterError(f"{table.place}: reserved: nothing is left of {memory_bytes} bytes of memory")
    table.finish()
    return emulate(device, speed)


def _flops(table: TomlTable, like: Device | None) -> dict[str, float]:
    flops_per_s = table.numbers("flops_per_s", like and like.flops_per_s)
    unknown = flops_per_s.keys() - FORMAT_BYTES.keys()
    if unknown or not flops_per_s:
        raise ClusterError(
            f"{table.place}: flops_per_s: the keys are {', '.join(FORMAT_BYTES)}, not {sorted(unknown)}"
        )
    return flops_per_s


def _local_device(torch_device: str, local: Sequence[Device], place: str) -> Device:
    for device in local:
        if device.torch_device == torch_device:
            return device
    raise ClusterError(
        f"{place}: give mem_bytes_per_s, flops_per_s, layer_overhead_s and step_overhead_s:"
        f" this machine has no {torch_device} to measure"
    )


def _read_link(table: TomlTable, hosts: set[str]) -> Link:
    ends = [table.text("src"), table.text("dst")]
    for host in ends:
        if host not in hosts:
            raise ClusterError(
                f"{table.place}: no device is on host '{host}'; hosts: {', '.join(sorted(hosts))}"
            )
    link = Link(
        src=ends[0],
        dst=ends[1],
        latency_s=table.number("latency_s", zero_allowed=True),
        bytes_per_s=table.bandwidth(),
    )
    table.finish()
    return link


def make_cluster(devices: Sequence[Device], links: Sequence[Link]) -> Cluster:
    """Checks names and adds the link inside each host where none is given.

    Hosts without a link between them cannot hold neighbouring stages. Raises ClusterError.
    """
    if not devices:
        raise ClusterError("no devices; name at least one, like laptop=cpu:600MiB")
    _refuse_repeated("device id", (device.id for device in devices))
    _refuse_repeated("link", (" – ".join(sorted((link.src, link.dst))) for link in links))
    joined = {link.src for link in links if link.src == link.dst}
    inside = [
        Link(src=host, dst=host, latency_s=INTRA_HOST_LATENCY_S, bytes_per_s=INTRA_HOST_BYTES_PER_S)
        for host in dict.fromkeys(device.host for device in devices)
        if host not in joined
    ]
    return Cluster(devices=tuple(devices), links=(*inside, *links))


def _refuse_repeated(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ClusterError(f"{what} '{name}' is given twice")
        seen.add(name)
