"""Host memory that a division which streams layers asks for: its devices' own where that is the host's, the weights
that are streamed out of it (in the page cache for a CPU, pinned for a GPU), and blocks that are swapped out.

Beyond it the page cache gives pages up, and weights are silently read from a disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apportion.types.cluster import Cluster
from apportion.types.plan import DeviceMemory, Stage
from apportion.types.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRoom:
    """Of a host in use. `disk_bytes` are those that its devices stream from its disk, and so none of its memory."""

    host: str
    devices_bytes: int
    streamed_bytes: int
    swap_bytes: int
    disk_bytes: int
    has_bytes: int | None
    """None where not known."""

    @property
    def needed_bytes(self) -> int:
        return self.devices_bytes + self.streamed_bytes + self.swap_bytes

    @property
    def crowded(self) -> bool:
        return self.streamed_bytes > 0 and self.has_bytes is not None and self.needed_bytes > self.has_bytes

    def statement(self) -> str:
        parts = [f"{format_bytes(self.streamed_bytes)} streamed out of the memory of {self.host}"]
        if self.devices_bytes:
            parts.append(f"{format_bytes(self.devices_bytes)} of its devices in it")
        if self.swap_bytes:
            parts.append(f"{format_bytes(self.swap_bytes)} of swapped blocks")
        has = "not known" if self.has_bytes is None else format_bytes(self.has_bytes)
        return f"{', '.join(parts)}, which is {has}"


def host_rooms(
    cluster: Cluster, stages: Sequence[Stage], memory: Mapping[str, DeviceMemory]
) -> tuple[HostRoom, ...]:
    """Of the hosts where layers are streamed."""
    rooms: list[HostRoom] = []
    used = [cluster.device(device_id) for stage in stages for device_id in stage.split.device_ids]
    for host in dict.fromkeys(device.host for device in used):
        here = [(device, memory[device.id]) for device in used if device.host == host]
        if not any(held.streamed_bytes for _, held in here):
            continue
        known = [device.host_memory_bytes for device, _ in here if device.host_memory_bytes is not None]
        rooms.append(
            HostRoom(
                host=host,
                devices_bytes=sum(held.engine_bytes for device, held in here if device.in_host_memory),
                streamed_bytes=sum(held.streamed_bytes for device, held in here if not device.reads_disk),
                swap_bytes=sum(held.swap_bytes for _, held in here),
                disk_bytes=sum(held.streamed_bytes for device, held in here if device.reads_disk),
                has_bytes=max(known, default=None),
            )
        )
    return tuple(rooms)
