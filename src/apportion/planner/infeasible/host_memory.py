"""What to say where a division would fit, but its streamed weights have no room in their host's memory."""

from apportion.planner.found import Found
from apportion.planner.host_room import found_rooms
from apportion.planner.infeasible.relief import Demand, changes
from apportion.types.errors import InfeasibleError
from apportion.types.units import format_bytes


def host_memory_error(demand: Demand, found: Found) -> InfeasibleError:
    """`found` is the best division for hosts with memory enough."""
    has = {device.host: device.host_memory_bytes for device in demand.cluster.devices}
    known = {device.host for device in demand.cluster.devices if device.disk_bytes_per_s is not None}
    rooms = [room for room in found_rooms(found) if room.needed_bytes > (has[room.host] or room.needed_bytes)]
    worst = max(rooms, key=lambda room: room.needed_bytes - (has[room.host] or 0))
    disk = (
        ""
        if worst.host in known
        else " and no rate is known of its disk, which CPUs may stream from instead: in a cluster file [[host]] name ="
        f' "{worst.host}", disk = "2 GB/s"; `apportion probe` measures it'
    )
    helping = ", or ".join(changes(demand, ()))
    held_bytes = worst.devices_bytes + worst.swap_bytes
    return InfeasibleError(
        f"{demand.model.name} fits only with {format_bytes(worst.streamed_bytes)} of weights streamed out of the memory"
        f" of {worst.host}, beside {format_bytes(held_bytes)} of its devices; that has"
        f" {format_bytes(has[worst.host] or 0)}{disk}; {f'try {helping}' if helping else 'add memory, or devices'}"
    )
