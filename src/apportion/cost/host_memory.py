"""Devices whose memory is their host's own: what each reads while others read beside it.

Device i reads r bytes/s by itself, and computes for a share s of the time (1; less where it is emulated). While it
does, the others at work read D = Σ s_j·r_j on average, and the host's memory gives its H bytes/s to all alike:

    r · min(1, H / (r + D))

At work with it are the other members of its group and, while several microbatches are under way, all such devices of
its host in the cluster. These may be more than a plan uses; but so a stage's time depends on its own group alone,
which the search and its bound rest on. A single microbatch that passes from stage to stage finds the others idle.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from apportion.types.cluster import Cluster, Device


def at_work(cluster: Cluster, devices: Sequence[Device], *, overlapping: bool) -> tuple[Device, ...]:
    """The devices of one stage as fast as they read in its steps; `overlapping` ones find other stages at work."""
    return tuple(
        device
        if device.host_bytes_per_s is None
        else _slowed(
            device, device.host_bytes_per_s, beside(cluster, device, devices, overlapping=overlapping)
        )
        for device in devices
    )


def _slowed(device: Device, host_bytes_per_s: float, beside: float) -> Device:
    share = host_bytes_per_s / (device.mem_bytes_per_s / device.speed * (1 + beside))
    return replace(device, mem_bytes_per_s=device.mem_bytes_per_s * min(1.0, share))


def beside(cluster: Cluster, device: Device, devices: Sequence[Device], *, overlapping: bool) -> float:
    """D / r: what others read beside one of a stage's devices, in terms of what it reads itself while it computes."""
    if device.host_bytes_per_s is None:
        return 0.0
    at_work_too = (other for other in (cluster.devices if overlapping else devices) if other.id != device.id)
    others = read_bytes_per_s(device.host, at_work_too) + cluster.others_bytes_per_s.get(device.host, 0.0)
    return others * device.speed / device.mem_bytes_per_s


def read_bytes_per_s(host: str, devices: Iterable[Device]) -> float:
    """D: what these read of the host's memory on average, each as fast as by itself."""
    return sum(
        device.mem_bytes_per_s
        for device in devices
        if device.host == host and device.host_bytes_per_s is not None
    )
