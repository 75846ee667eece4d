"""Where streamed weights stay: in their host's memory, or where that has no room for them on its disk.

A division's devices and streamed weights share their host's memory, which ties its stages together, and the search
knows no such tie. So it is searched without; if what is found does not fit a host's memory, it is searched again with
the host's CPUs streaming from its disk, at the rate of that, and then without streaming to the host's GPUs. What is
found at last is the best of the divisions that stream from there.
"""

from collections.abc import Callable
from dataclasses import replace

from apportion.cost.host_room import HostRoom, host_rooms
from apportion.cost.memory import stages_memory
from apportion.planner.found import Found
from apportion.types.cluster import Cluster, Device


def find_with_host_room(cluster: Cluster, find: Callable[[Cluster], Found | None]) -> Found | None:
    """What `find` finds once every host's memory has room for it."""
    while True:
        found = find(cluster)
        crowded = {room.host for room in found_rooms(found) if room.crowded} if found else set[str]()
        if not crowded:
            return found
        cluster = replace(
            cluster, devices=tuple(_relieved(device, crowded, cluster) for device in cluster.devices)
        )


def found_rooms(found: Found) -> tuple[HostRoom, ...]:
    problem = found.problem
    memory = stages_memory(problem.model, problem.cluster, found.stages, problem.capacity, affine=False)
    return host_rooms(problem.cluster, found.stages, memory)


def without_host_memory(cluster: Cluster) -> Cluster:
    """As though nothing were known of it."""
    return replace(
        cluster, devices=tuple(replace(device, host_memory_bytes=None) for device in cluster.devices)
    )


def _relieved(device: Device, crowded: set[str], cluster: Cluster) -> Device:
    """A CPU that streams out of such a host's memory does so no more; a GPU where no CPU does."""
    if device.host not in crowded or device.stream_bytes_per_s is None or device.reads_disk:
        return device
    if device.kind == "cpu":
        return replace(device, stream_bytes_per_s=device.disk_bytes_per_s, stream_from="disk")
    from_memory = any(
        other.kind == "cpu" and other.stream_bytes_per_s is not None and not other.reads_disk
        for other in cluster.devices
        if other.host == device.host
    )
    return device if from_memory else replace(device, stream_bytes_per_s=None)
