"""A cluster in a TOML file: docs/cluster-file.md lists its keys."""

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import cast, get_args

from apportion.catalog.cluster_rules import (
    ASSUMED_LATENCY,
    ASSUMED_LATENCY_S,
    NOWHERE,
    Here,
    HostFigures,
    Local,
    check_count,
    check_speed,
    emulate,
    make_cluster,
    numbered,
)
from apportion.catalog.datasheet import (
    DESKTOP,
    check_stream,
    gpu_device,
    inside_bytes_per_s,
    processor_device,
    torch_device,
    with_memory,
)
from apportion.catalog.device_text import lacks
from apportion.catalog.gpus import Gpu, find_device
from apportion.catalog.processors import Processor
from apportion.catalog.toml_table import TomlTable
from apportion.types.cluster import (
    ASSUMED_SPREAD,
    LOCAL_HOST,
    Cache,
    Cluster,
    Device,
    DeviceKind,
    FigureSource,
    Link,
    StreamSource,
)
from apportion.types.errors import ClusterError
from apportion.types.names import unknown_name
from apportion.types.text_file import read_text
from apportion.types.units import WEIGHT_BITS

_TORCH_DEVICES: dict[DeviceKind, str] = {
    "cpu": r"cpu",
    "cuda": r"cuda:\d+",
    "rocm": r"cuda:\d+",
    "metal": r"mps",
    "xpu": r"xpu:\d+",
    "npu": r"npu:\d+",
}
_KEYS = ("device", "link", "host")
_DEVICE_KEYS = (
    "gpu",
    "cpu",
    "id",
    "host",
    "kind",
    "torch_device",
    "count",
    "memory",
    "reserved",
    "speed",
    "mem_bytes_per_s",
    "flops_per_s",
    "layer_overhead_s",
    "step_overhead_s",
    "num_threads",
    "stream",
    "stream_from",
    "cache",
)
_CACHE_KEYS = ("bytes", "read_bytes_per_s", "copied_bytes_per_s")
_HOST_KEYS = ("name", "mem_bytes_per_s", "memory", "disk")
_LINK_KEYS = ("src", "dst", "latency", "latency_s", "bandwidth", "bytes_per_s", "source")
_RATES = ("mem_bytes_per_s", "flops_per_s", "layer_overhead_s", "step_overhead_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machines:
    """Whose rates a device takes where they are not given; `local` measures this machine's."""

    local: Callable[[], Sequence[Device]]
    cpus: Counter[str]
    """CPU devices by host."""
    elsewhere: bool
    """Whether devices without a host are of another machine."""

    def is_here(self, host: str) -> bool:
        return host == LOCAL_HOST and not self.elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One [[device]]; `named` and `placed` say that its id and its torch device were given."""

    device: Device
    count: int
    gpu: Gpu | None
    named: bool
    placed: bool


def read_cluster_toml(path: Path, local: Local, here: Here = NOWHERE) -> Cluster:
    """Devices of several hosts and the links between them. `local` is called only where a rate is not given.

    Raises ClusterError naming the place.
    """
    table = TomlTable(str(path), _read(path), _KEYS)
    tables = table.tables("device", "device", _DEVICE_KEYS)
    check_count(len(tables))
    machines = _machines(tables, local, here)
    entries = [_read_entry(one, machines) for one in tables]
    check_count(sum(entry.count for entry in entries))
    hosts = {entry.device.host for entry in entries}
    links = [_read_link(one, hosts) for one in table.tables("link", "link", _LINK_KEYS)]
    memory = _read_hosts(table.tables("host", "host", _HOST_KEYS), hosts)
    table.finish()
    in_hosts = [(entry.device.host, entry.gpu) for entry in entries if entry.gpu is not None]
    return make_cluster(_expanded(entries), links, inside_bytes_per_s(in_hosts), memory)


def _machines(tables: Sequence[TomlTable], local: Local, here: Here) -> _Machines:
    cpus: Counter[str] = Counter()
    beside: list[Gpu | Processor] = []
    for table in tables:
        host, count = str(table.peek("host", LOCAL_HOST)), table.peek("count", 1)
        if not table.has("gpu") and table.peek("kind", "cpu") == "cpu":
            cpus[host] += count if isinstance(count, int) else 1
        if table.has("gpu") and host == LOCAL_HOST:
            with suppress(ClusterError):
                beside.append(find_device(str(table.peek("gpu"))))
    return _Machines(local=cache(lambda: local(len(tables))), cpus=cpus, elsewhere=lacks(beside, here))


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"cannot read cluster {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ClusterError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise ClusterError(f"{path} is no cluster: it is nested too deeply") from None


def _expanded(entries: Sequence[_Entry]) -> list[Device]:
    """A device for each of its count; GPUs of the catalogue take their host's devices in order."""
    used: Counter[tuple[str, str]] = Counter()
    devices: list[Device] = []
    every = [entry for entry in entries for _ in range(entry.count)]
    for entry, device_id in zip(every, _ids(entries), strict=True):
        device = replace(entry.device, id=device_id)
        if entry.gpu is not None:
            place = (device.host, entry.gpu.kind)
            if not entry.placed:
                device = replace(device, torch_device=torch_device(entry.gpu.kind, used[place]))
            used[place] += 1
        devices.append(device)
    return devices


def _ids(entries: Sequence[_Entry]) -> list[str]:
    """Numbered within an entry that has a name, and throughout the file where the GPU's stands for it."""
    of_gpus = iter(
        numbered([entry.device.id for entry in entries if not entry.named for _ in range(entry.count)])
    )
    return [
        device_id
        for entry in entries
        for device_id in (
            numbered([entry.device.id] * entry.count) if entry.named else islice(of_gpus, entry.count)
        )
    ]


def _read_entry(table: TomlTable, machines: _Machines) -> _Entry:
    of = _read_named(table)
    gpu = of if isinstance(of, Gpu) else None
    named = table.has("id")
    device_id = table.text("id", of and of.key)
    table.place += f" ({device_id})"
    host = table.text("host", LOCAL_HOST)
    kinds = tuple(_TORCH_DEVICES)
    kind = cast(DeviceKind, table.choice("kind", kinds, gpu.kind if gpu else "cpu"))
    if gpu is not None and kind != gpu.kind:
        raise ClusterError(f"{table.place}: kind: {gpu.key} is a {gpu.kind} device, not {kind}")
    placed = table.has("torch_device")
    first = "cpu" if kind == "cpu" else torch_device(kind, 0)
    torch_name = table.text("torch_device", first)
    if re.fullmatch(_TORCH_DEVICES[kind], torch_name) is None:
        raise ClusterError(f"{table.place}: torch_device: '{torch_name}' is no {kind} device")
    count = table.count("count", 1)
    if count > 1 and placed:
        raise ClusterError(f"{table.place}: torch_device: {count} devices cannot all be {torch_name}")
    like = _like(table, of, device_id, host, torch_name, machines)
    device = _read_device(table, like, gpu, kind)
    device = replace(device, id=device_id, host=host, torch_device=torch_name)
    return _Entry(device=device, count=count, gpu=gpu, named=named, placed=placed)


def _read_named(table: TomlTable) -> Gpu | Processor | None:
    """What `gpu` or `cpu` names."""
    key = next((key for key in ("gpu", "cpu") if table.has(key)), None)
    if key is None:
        return None
    try:
        found = find_device(table.text(key))
    except ClusterError as error:
        raise ClusterError(f"{table.place}: {key}: {error}") from None
    if isinstance(found, Gpu) != (key == "gpu"):
        right = "gpu" if isinstance(found, Gpu) else "cpu"
        raise ClusterError(f'{table.place}: {key}: write it as {right} = "{found.key}"')
    return found


def _like(
    table: TomlTable,
    of: Gpu | Processor | None,
    device_id: str,
    host: str,
    torch_name: str,
    machines: _Machines,
) -> Device | None:
    """Whose rates a device takes where they are not given: a CPU of another machine those of a desktop's."""
    if isinstance(of, Gpu):
        return gpu_device(of, device_id, host)
    if of is not None:
        return processor_device(of, device_id, host, None)
    if all(table.has(rate) for rate in _RATES):
        return None
    if torch_name == "cpu" and not machines.is_here(host):
        if not table.has("memory"):
            raise ClusterError(f"{table.place}: give the memory of host '{host}', like memory = \"16GiB\"")
        return processor_device(DESKTOP, device_id, host, None, machines.cpus[host])
    for device in machines.local() if machines.is_here(host) else ():
        if device.torch_device == torch_name:
            return device
    raise ClusterError(
        f"{table.place}: give gpu, or {', '.join(_RATES[:-1])} and {_RATES[-1]}:"
        f" this machine has no {torch_name} to measure"
    )


def _read_device(table: TomlTable, like: Device | None, gpu: Gpu | None, kind: DeviceKind) -> Device:
    """Memory that is given for a GPU is what the engine may use of it: nothing of that is reserved for the driver."""
    speed = check_speed(table.number("speed", 1.0), table.place)
    reserved_bytes = like.reserved_bytes if like and not table.has("memory") else 0
    given = table.has("memory")
    memory_bytes = table.size_bytes("memory", like and like.memory_bytes)
    assumed = like and like.assumed
    if gpu is not None and like is not None and given:
        assumed = with_memory(gpu, like, memory_bytes, f"{table.place}: memory").assumed
    stream_bytes_per_s, stream_from = _stream(table, like, gpu, kind)
    device = Device(
        id="",
        host="",
        kind=kind,
        torch_device="",
        memory_bytes=memory_bytes,
        reserved_bytes=table.size_bytes("reserved", reserved_bytes, zero_allowed=True),
        mem_bytes_per_s=table.number("mem_bytes_per_s", like and like.mem_bytes_per_s),
        flops_per_s=_flops(table, like),
        layer_overhead_s=table.number("layer_overhead_s", like and like.layer_overhead_s, zero_allowed=True),
        step_overhead_s=table.number("step_overhead_s", like and like.step_overhead_s, zero_allowed=True),
        num_threads=table.count("num_threads", like.num_threads if like else 1),
        host_cores=like and like.host_cores,
        speed=1.0,
        source="datasheet" if like is None else like.source,
        spread=ASSUMED_SPREAD if like is None else like.spread,
        stream_bytes_per_s=stream_bytes_per_s,
        host_bytes_per_s=like and like.host_bytes_per_s,
        stream_from=stream_from,
        cache=_cache(table, like),
        host_memory_bytes=like and like.host_memory_bytes,
        disk_bytes_per_s=like and like.disk_bytes_per_s,
        assumed=assumed,
        compute_capability=like and like.compute_capability,
    )
    if device.usable_bytes <= 0:
        raise ClusterError(f"{table.place}: reserved: nothing is left of {memory_bytes} bytes of memory")
    table.finish()
    return emulate(device, speed)


def _stream(
    table: TomlTable, like: Device | None, gpu: Gpu | None, kind: DeviceKind
) -> tuple[float | None, StreamSource]:
    """How fast weights that are not held come, and where from. Raises ClusterError for what cannot be."""
    sources = get_args(StreamSource)
    source = cast(
        StreamSource, table.choice("stream_from", sources, like.stream_from if like else sources[0])
    )
    if source == "disk" and (kind != "cpu" or not table.has("stream")):
        raise ClusterError(
            f"{table.place}: stream_from: a disk streams layers to a cpu device alone, and its rate is needed:"
            ' stream = "2 GB/s"'
        )
    bytes_per_s = table.stream(like and like.stream_bytes_per_s)
    if gpu is not None:
        check_stream(gpu, bytes_per_s, f"{table.place}: stream")
    return bytes_per_s, source


def _cache(table: TomlTable, like: Device | None) -> Cache | None:
    if not table.has("cache"):
        return like and like.cache
    figures = table.numbers("cache", None)
    table.check_keys("key of cache", figures, _CACHE_KEYS)
    if len(figures) < len(_CACHE_KEYS):
        raise ClusterError(f"{table.place}: cache: all of {', '.join(_CACHE_KEYS)} are needed")
    return Cache(
        num_bytes=int(figures["bytes"]),
        read_bytes_per_s=figures["read_bytes_per_s"],
        copied_bytes_per_s=figures["copied_bytes_per_s"],
    )


def _flops(table: TomlTable, like: Device | None) -> dict[str, float]:
    flops_per_s = table.numbers("flops_per_s", like and like.flops_per_s)
    table.check_keys("weight format of flops_per_s", flops_per_s, WEIGHT_BITS)
    if not flops_per_s:
        raise ClusterError(f"{table.place}: flops_per_s: give at least one of {', '.join(WEIGHT_BITS)}")
    return flops_per_s


def _read_hosts(tables: Sequence[TomlTable], hosts: set[str]) -> dict[str, HostFigures]:
    """What each host's memory gives to all that share it, how much it is, and how fast its disk is read."""
    figures: dict[str, HostFigures] = {}
    for table in tables:
        name = _known_host(table, table.text("name"), hosts)
        if name in figures:
            raise ClusterError(f"{table.place}: host '{name}' is given twice")
        figures[name] = HostFigures(
            mem_bytes_per_s=table.number("mem_bytes_per_s") if table.has("mem_bytes_per_s") else None,
            memory_bytes=table.size_bytes("memory") if table.has("memory") else None,
            disk_bytes_per_s=table.rate("disk") if table.has("disk") else None,
        )
        if figures[name] == HostFigures():
            raise ClusterError(f"{table.place}: give at least one of mem_bytes_per_s, memory and disk")
        table.finish()
    return figures


def _known_host(table: TomlTable, name: str, hosts: set[str]) -> str:
    if name not in hosts:
        raise ClusterError(f"{table.place}: {unknown_name('host', name, sorted(hosts))}")
    return name


def _read_link(table: TomlTable, hosts: set[str]) -> Link:
    ends = [_known_host(table, table.text(end), hosts) for end in ("src", "dst")]
    latency_s = table.latency()
    link = Link(
        src=ends[0],
        dst=ends[1],
        latency_s=ASSUMED_LATENCY_S if latency_s is None else latency_s,
        assumed=ASSUMED_LATENCY if latency_s is None else None,
        bytes_per_s=table.bandwidth(),
        source=cast(FigureSource, table.choice("source", get_args(FigureSource), "datasheet")),
    )
    table.finish()
    return link
