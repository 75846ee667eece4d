"""Devices whose memory is their host's own: what each reads while others read beside it.

A device reads r bytes/s by itself. While the others at work read D together, the host's memory gives its H bytes/s to
all alike, and reading takes

    max(1, (r + D) / H)

times as long. An emulated device computes for a share s of the time alone, its speed: then the others are all taken to
compute at once, for the share of the time that they do on average, which is exact for one and no less for several.

At work with it are the other members of its group and, while several microbatches are under way, all such devices of
its host in the cluster. These may be more than a plan uses; but so a stage's time depends on its own group alone,
which the search and its bound rest on. A single microbatch that passes from stage to stage finds the others idle.
A disk gives all that stream from it equal parts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from apportion.types.cluster import Cluster, Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What others read beside a device: `most` at once, in terms of what it reads itself (D / r), for a `share` of the
    time."""

    most: float
    share: float

    def slowdown(self, mem_bytes_per_s: float, host_bytes_per_s: float) -> float:
        """Of a device that reads `mem_bytes_per_s` by itself, at full speed."""
        alone, beside = (
            max(1.0, mem_bytes_per_s * (1 + reading) / host_bytes_per_s) for reading in (0.0, self.most)
        )
        return alone + self.share * (beside - alone)


ALONE = Beside(most=0.0, share=0.0)


def at_work(cluster: Cluster, devices: Sequence[Device], *, overlapping: bool) -> tuple[Device, ...]:
    """The devices of one stage as fast as they read in its steps; `overlapping` ones find other stages at work."""
    return tuple(
        _reading_disk(
            _slowed(device, beside(cluster, device, devices, overlapping=overlapping)),
            cluster.devices if overlapping else devices,
        )
        for device in devices
    )


def _slowed(device: Device, others: Beside) -> Device:
    """Also in copying out of that memory."""
    if device.host_bytes_per_s is None:
        return device
    slowdown = others.slowdown(device.mem_bytes_per_s / device.speed, device.host_bytes_per_s)
    device = replace(device, mem_bytes_per_s=device.mem_bytes_per_s / slowdown)
    if device.stream_bytes_per_s is None or device.stream_buffers > 1:
        return device
    return replace(device, stream_bytes_per_s=device.stream_bytes_per_s / slowdown)


def _reading_disk(device: Device, at_work_too: Sequence[Device]) -> Device:
    """With its part of the disk, where others stream from that too."""
    if device.stream_bytes_per_s is None or not device.reads_disk:
        return device
    readers = [other for other in at_work_too if other.host == device.host and other.reads_disk]
    return replace(device, stream_bytes_per_s=device.stream_bytes_per_s / len(readers))


def beside(cluster: Cluster, device: Device, devices: Sequence[Device], *, overlapping: bool) -> Beside:
    """What others read beside one of a stage's devices."""
    if device.host_bytes_per_s is None:
        return ALONE
    at_work_too = [other for other in (cluster.devices if overlapping else devices) if other.id != device.id]
    mean, most = reading(device.host, at_work_too)
    outside_mean, outside_most = cluster.others_bytes_per_s.get(device.host, (0.0, 0.0))
    mean, most = mean + outside_mean, most + outside_most
    own = device.mem_bytes_per_s / device.speed
    if device.host_cores is not None:  # as many threads as cores read at once
        most = min(most, max(own * (device.host_cores / device.num_threads - 1), 0.0))
    return Beside(most=most / own, share=min(1.0, mean / most)) if most > 0 else ALONE


def reading(host: str, devices: Iterable[Device]) -> tuple[float, float]:
    """Bytes/s that these read of the host's memory, each as fast as by itself: on average, and at most."""
    sharing = [device for device in devices if device.host == host and device.host_bytes_per_s is not None]
    mean = sum(device.mem_bytes_per_s for device in sharing)
    return mean, sum(device.mem_bytes_per_s / device.speed for device in sharing)
