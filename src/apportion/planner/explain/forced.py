"""Divisions on changed clusters, and the best that uses a device which the plan does without."""

from dataclasses import replace

from apportion.planner.weigh import Division, best_division
from apportion.types.cluster import Cluster, Device
from apportion.types.constraints import Pin
from apportion.types.plan import Plan


def forced_division(plan: Plan, device_id: str) -> Division | None:
    """The best that keeps the plan's constraints, but for an exclusion of the device, and uses it; None where there is
    none."""
    constraints = plan.constraints
    demanded = replace(
        constraints,
        excluded=tuple(name for name in constraints.excluded if name != device_id),
        pins=(*constraints.pins, Pin(device_id=device_id)),
    )
    return best_division(plan.model, plan.cluster, plan.workload, plan.weight_formats, demanded)


def replan(plan: Plan, cluster: Cluster) -> Division | None:
    return best_division(plan.model, cluster, plan.workload, plan.weight_formats, plan.constraints)


def faster(device: Device, factor: float) -> Device:
    return replace(
        device,
        mem_bytes_per_s=device.mem_bytes_per_s * factor,
        flops_per_s={name: rate * factor for name, rate in device.flops_per_s.items()},
        layer_overhead_s=device.layer_overhead_s / factor,
        step_overhead_s=device.step_overhead_s / factor,
    )


def with_device(cluster: Cluster, changed: Device) -> Cluster:
    devices = (changed if device.id == changed.id else device for device in cluster.devices)
    return replace(cluster, devices=tuple(devices))
