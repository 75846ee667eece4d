"""What a plan takes for granted of devices and links, because nobody said it: one line each."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apportion.planner.plan_file import Planned
    from apportion.types.cluster import Device


def assumptions(plan: "Planned") -> list[str]:
    """Of the devices that the plan uses, and of the links between their hosts."""
    devices = [plan.cluster.device(device_id) for device_id in plan.device_ids]
    hosts = {device.host for device in devices}
    links = [link for link in plan.cluster.links if {link.src, link.dst} <= hosts and link.assumed]
    return [
        *_of_devices(devices),
        *(
            f"assumed of link {link.src}-{link.dst}: {link.assumed}; write it behind the bandwidth"
            for link in links
        ),
        *_widened(plan),
        *_of_model(plan),
    ]


def _of_model(plan: "Planned") -> list[str]:
    from apportion.cost.window_saving import window_saving
    from apportion.types.plan import Plan

    one = plan if isinstance(plan, Plan) else plan.replicas[0]
    return [*(f"of the model: {note}" for note in one.model.notes), *window_saving(one)]


def _of_devices(devices: "list[Device]") -> list[str]:
    by_text: dict[tuple[str, bool], list[str]] = {}
    for device in devices:
        if device.assumed:
            by_text.setdefault((device.assumed, device.kind == "cpu"), []).append(device.id)
    advice = "; name the computer (raspberry-pi-5, intel-n100), or write its rates in a cluster file"
    return [
        f"assumed of {', '.join(ids)}: {text}{advice * is_cpu}" for (text, is_cpu), ids in by_text.items()
    ]


def _widened(plan: "Planned") -> list[str]:
    """int8 and int4 go at the rate of 16 bits everywhere, as docs/cost-model.md says."""
    from apportion.types.plan import Plan

    by_formats: dict[tuple[str, str], list[str]] = {}
    for stage in (
        stage for one in ((plan,) if isinstance(plan, Plan) else plan.replicas) for stage in one.stages
    ):
        for device in map(plan.cluster.device, stage.split.device_ids):
            name, wider = stage.weight_format, device.widened_to(stage.weight_format)
            if wider == "fp32" and device.kind != "cpu":
                by_formats.setdefault((name, wider), []).append(device.id)
    return [
        f"assumed of {', '.join(ids)}: {name} weights go at the {wider} rate, for want of one of their own"
        for (name, wider), ids in by_formats.items()
    ]
