"""What a plan chooses among, written out without the planner: brute force goes through all of it."""

from collections.abc import Sequence
from dataclasses import replace

from apportion.planner.stages.groups import device_figures
from apportion.types.cluster import Cluster, Device
from apportion.types.workload import Workload

CHUNK_TOKENS = (16, 32, 64, 128, 256)


def every_microbatches(workload: Workload, num_devices: int) -> range:
    """All numbers with a sequence for each microbatch and messages for all: two to a device."""
    if workload.objective == "latency":  # of one request alone, to which the number makes no difference
        return range(1, 2)
    return range(1, min(workload.concurrency, 2 * num_devices) + 1)


def every_chunk(workload: Workload) -> tuple[int, ...]:
    """All sizes up to the context, or the smallest."""
    return tuple(size for size in CHUNK_TOKENS if size <= workload.max_context_tokens) or CHUNK_TOKENS[:1]


def every_coordinator(cluster: Cluster) -> list[Cluster]:
    """The coordinator on the host of any device."""
    return [replace(cluster, coordinator=host) for host in {device.host for device in cluster.devices}]


def rank_order(devices: Sequence[Device]) -> list[Device]:
    """In which devices of one host are members of a group: a group is a set, which has one order."""
    return sorted(
        devices, key=lambda one: (-one.memory_bytes, -one.mem_bytes_per_s, repr(device_figures(one)))
    )
