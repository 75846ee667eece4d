"""What holds of any device and link, whoever describes them: a person, a file, a plan, another machine.

A fault is the field that is wrong and what is wrong with it.
"""

import re
from collections.abc import Iterator
from math import isfinite

from apportion.types.cluster import Device, Link

SLOWEST = 1e-4
"""The least speed of an emulated device: a step of milliseconds takes a minute."""
MOST_THREADS = 4096
_MOST_RATE = 1e18
_MOST_OVERHEAD_S = 1e6
_MOST_ID = 100
_RESERVED = ("coordinator", ".", "..")
_TORCH_CPU, _TORCH_GPU = "cpu", re.compile(r"[a-z]+(:\d{1,3})?")

Fault = tuple[str, str]


def is_rate(value: object) -> bool:
    """Whether it can be so many bytes or operations in a second."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isfinite(value) and 1 <= value <= _MOST_RATE


def id_problem(device_id: str) -> str | None:
    """An id is a word to type and to print: not empty, not long, no path."""
    if device_id in _RESERVED:
        return f"'{device_id}' means something else; choose another name"
    if not 0 < len(device_id) <= _MOST_ID:
        return f"an id has 1 to {_MOST_ID} characters"
    if not device_id.isprintable() or device_id != device_id.strip() or set("/\\") & set(device_id):
        return f"{device_id!r} is no id: no slash, no control character, no space at an end"
    return None


def device_faults(device: Device) -> Iterator[Fault]:
    if (problem := id_problem(device.id)) is not None:
        yield "id", problem
    if not SLOWEST <= device.speed <= 1:
        yield "speed", f"{device.speed:g} is not from {SLOWEST:g} to 1"
    if not 1 <= device.num_threads <= (device.host_cores or MOST_THREADS):
        yield "num_threads", f"{device.num_threads} is not from 1 to {device.host_cores or MOST_THREADS}"
    if device.reserved_bytes >= device.memory_bytes:
        yield "reserved_bytes", "nothing of its memory is left"
    fits = device.torch_device == _TORCH_CPU if device.kind == "cpu" else _is_gpu(device.torch_device)
    if not fits:
        yield "torch_device", f"'{device.torch_device}' is none of a {device.kind} device"
    for name, rate in _rates(device):
        if rate is not None and not is_rate(rate):
            yield name, f"{rate:g} is no rate: from 1 to {_MOST_RATE:g} a second"
    for name in ("layer_overhead_s", "step_overhead_s"):
        if not 0 <= getattr(device, name) <= _MOST_OVERHEAD_S:
            yield name, f"{getattr(device, name):g} is not from 0 to {_MOST_OVERHEAD_S:g} seconds"


def link_faults(link: Link) -> Iterator[Fault]:
    if not is_rate(link.bytes_per_s):
        yield "bytes_per_s", f"{link.bytes_per_s:g} is no rate: from 1 to {_MOST_RATE:g} a second"
    for name in ("latency_s", "hop_s"):
        if not 0 <= getattr(link, name) <= _MOST_OVERHEAD_S:
            yield name, f"{getattr(link, name):g} is not from 0 to {_MOST_OVERHEAD_S:g} seconds"


def _is_gpu(torch_device: str) -> bool:
    return torch_device != _TORCH_CPU and _TORCH_GPU.fullmatch(torch_device) is not None


def _rates(device: Device) -> Iterator[tuple[str, float | None]]:
    for name in ("mem_bytes_per_s", "stream_bytes_per_s", "host_bytes_per_s", "disk_bytes_per_s"):
        yield name, getattr(device, name)
    for name, rate in device.flops_per_s.items():
        yield f"flops_per_s.{name}", rate
    if device.cache is not None:
        yield "cache.read_bytes_per_s", device.cache.read_bytes_per_s
        yield "cache.copied_bytes_per_s", device.cache.copied_bytes_per_s
