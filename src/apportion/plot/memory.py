"""Each device's memory as a bar, all to one scale."""

from collections.abc import Iterator, Sequence

from apportion.plot.axis import Axis, bytes_axis
from apportion.plot.svg import (
    BLANK,
    CROSSES,
    DOTS,
    LABEL_PX,
    LINES,
    SOLID,
    STRIPES,
    Drawing,
    Fill,
    shortened,
    text_width_px,
)
from apportion.types.cluster import Device
from apportion.types.plan import Plan
from apportion.types.units import format_bytes

KINDS: dict[str, Fill] = {
    "weights": SOLID,
    "KV": STRIPES,
    "streamed": LINES,
    "workspace": DOTS,
    "reserved": CROSSES,
    "free": BLANK,
}
LEFT_PX, RIGHT_PX = 250.0, 830.0
ROW_PX, BAR_PX = 44.0, 26.0


def parts(plan: Plan, device: Device) -> dict[str, int]:
    """Bytes by kind, which sum to the device's memory; a device without a share is all reserved or free."""
    memory = plan.memory.get(device.id)
    if memory is None:
        return {"reserved": device.reserved_bytes, "free": device.usable_bytes}
    return {
        "weights": memory.weights_bytes,
        "KV": memory.kv_bytes,
        "streamed": memory.stream_buffer_bytes,
        "workspace": memory.workspace_bytes + memory.buffer_bytes,
        "reserved": memory.reserved_bytes,
        "free": device.memory_bytes - memory.total_bytes,
    }


def draw_memory(drawing: Drawing, plan: Plan) -> None:
    devices = _in_plan_order(plan)
    drawing.text(24, drawing.y_px + 14, "Memory of each device", size_px=15, bold=True)
    present = {kind for device in devices for kind, size in parts(plan, device).items() if size > 0}
    _legend(drawing, drawing.y_px + 14, [kind for kind in KINDS if kind in present])
    top_px = drawing.y_px + 30
    bottom_px = top_px + ROW_PX * len(devices)
    axis = bytes_axis(max(_shown_bytes(plan, device) for device in devices), LEFT_PX, RIGHT_PX)
    axis.draw(drawing, top_px, bottom_px)
    for number, device in enumerate(devices):
        _draw_device(drawing, plan, device, axis, top_px + ROW_PX * number)
    drawing.y_px = bottom_px + 44


def _in_plan_order(plan: Plan) -> list[Device]:
    unused = [device for device in plan.cluster.devices if device.id not in plan.device_ids]
    return [*(plan.cluster.device(device_id) for device_id in plan.device_ids), *unused]


def _shown_bytes(plan: Plan, device: Device) -> int:
    """More than the device has where a plan that was edited by hand overfills it."""
    return sum(max(0, size_bytes) for size_bytes in parts(plan, device).values())


def _legend(drawing: Drawing, baseline_px: float, kinds: Sequence[str]) -> None:
    x = LEFT_PX + 60
    for name in kinds:
        words = "workspace, buffers" if name == "workspace" else name
        drawing.rect(x, baseline_px - 11, 16, 13, KINDS[name], {"legend": name})
        drawing.text(x + 22, baseline_px, words)
        x += 40 + text_width_px(words, 12)


def _draw_device(drawing: Drawing, plan: Plan, device: Device, axis: Axis, top_px: float) -> None:
    name = f"{device.id} (emulated)" if device.emulated else device.id
    drawing.text(24, top_px + 17, shortened(name, LEFT_PX - 36, 13), size_px=13, bold=True)
    drawing.text(24, top_px + 32, shortened(_role(plan, device), LEFT_PX - 36, LABEL_PX), size_px=LABEL_PX)
    x, y = axis.left_px, top_px + (ROW_PX - BAR_PX) / 2
    for kind, size_bytes in parts(plan, device).items():
        if size_bytes > 0:
            width = axis.width_px(size_bytes)
            data = {"device": device.id, "kind": kind, "bytes": size_bytes}
            drawing.rect(x, y, width, BAR_PX, KINDS[kind], data)
            words = format_bytes(size_bytes)
            if text_width_px(words, LABEL_PX) + 6 <= width:
                drawing.label(x + width / 2, y + 17, words, KINDS[kind])
            x += width
    used = device.memory_bytes - parts(plan, device)["free"]
    drawing.text(x + 8, y + 17, f"{used / device.memory_bytes:.0%} used", size_px=11)


def _role(plan: Plan, device: Device) -> str:
    return next(_roles(plan, device), "takes no part")


def _roles(plan: Plan, device: Device) -> Iterator[str]:
    for number, stage in enumerate(plan.stages):
        if device.id in stage.split.device_ids:
            rank = stage.split.device_ids.index(device.id)
            share = f", {stage.split.kv_heads[rank]}/{plan.model.kv_heads} heads"
            only = stage.num_layers == 1
            layers = (
                f"layer {stage.layer_start}" if only else f"layers {stage.layer_start}–{stage.layer_stop - 1}"
            )
            streams = f", {len(stage.streamed_layers)} streamed"
            yield (
                f"stage {number}, {layers}{share if stage.split.size > 1 else ''}"
                f"{streams if stage.streamed_layers else ''}"
            )
