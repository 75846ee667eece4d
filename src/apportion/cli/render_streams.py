"""What a plan streams, as lines beside its tables."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from rich.console import Console
from rich.markup import escape

from apportion.cost.estimate import microbatch_steps, stage_timing
from apportion.cost.host_room import HostRoom, host_rooms
from apportion.types.plan import Plan
from apportion.types.units import format_bytes, format_seconds


def print_streams(console: Console, plan: Plan) -> None:
    """What is asked for beside the devices' memory, and what it costs."""
    for number, stage in enumerate(plan.stages):
        for device_id in stage.split.device_ids if stage.streamed_layers else ():
            device, streamed_bytes = plan.cluster.device(device_id), plan.memory[device_id].streamed_bytes
            member = f" to {device_id}" if stage.split.size > 1 else ""
            where = "a disk" if device.stream_from == "disk" else "host memory"
            if where == "host memory":
                where += f" ({'the page cache' if device.kind == 'cpu' else 'pinned memory'})"
            beside = "beside computing" if device.stream_buffers > 1 else "which it copies itself"
            rate = device.stream_bytes_per_s or inf
            console.print(
                f"stage {number} streams {len(stage.streamed_layers)} of its {stage.num_layers} layers "
                f"({_ranges(stage.streamed_layers)}){member}: {format_bytes(streamed_bytes)} of {where}, "
                f"at {rate / 1e9:.3g} GB/s, {beside}"
            )
        if stage.streamed_layers:
            console.print(
                f"so a decode step of stage {number} takes {format_seconds(_added_s(plan, number))} longer"
            )
    for room in host_rooms(plan.cluster, plan.stages, plan.memory):
        console.print(escape(_host_room(room)))


def _added_s(plan: Plan, number: int) -> float:
    """Than if the stage's devices held all its layers."""
    steps = microbatch_steps(plan.workload, plan.chunk_tokens, plan.microbatches)
    held = replace(plan.stages[number], streamed_layers=())
    return plan.estimate.stage_s[number] - stage_timing(plan.model, plan.cluster, held, steps).decode_s


def _host_room(room: HostRoom) -> str:
    """What streaming takes of a host's memory, or why it does not."""
    if room.streamed_bytes and room.has_bytes is None:
        return f"{room.statement()}: what has no room is read from its disk, slower; see [[host]] memory"
    if room.streamed_bytes:
        return room.statement()
    text = f"{format_bytes(room.disk_bytes)} streamed from the disk of {room.host}"
    if room.has_bytes is None or room.devices_bytes + room.disk_bytes <= room.has_bytes:
        return text
    devices, has = format_bytes(room.devices_bytes), format_bytes(room.has_bytes)
    return f"{text}: beside {devices} of its devices they have no room in its memory, which is {has}"


def _ranges(layers: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> "0–2, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
