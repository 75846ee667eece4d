"""A cluster whose constants come from what was measured in runs, with how far to trust them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from apportion.calibrate.fit import Constants, Fit, fit_device, fit_hop_s, fit_latency_s
from apportion.calibrate.observation import Observation, link_hardware
from apportion.calibrate.quiet import undisturbed
from apportion.catalog.cluster_rules import emulate
from apportion.types.cluster import Cluster, Device, Link, Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """`fits` are by device id; a device without one keeps its assumed constants."""

    cluster: Cluster
    fits: Mapping[str, Fit]


def apply(
    cluster: Cluster,
    seen: Sequence[Observation],
    weight_formats: tuple[str, ...],
    hardware: Mapping[str, str],
) -> Calibrated:
    """`hardware` names devices by id; those left out, and those never seen in these formats, are kept as they are."""
    quiet = _quiet(seen)
    fits: dict[str, Fit] = {}
    devices: list[Device] = []
    for device in cluster.devices:
        own = _most_seen(device, quiet, weight_formats, hardware)
        if own:
            weight_format = own[0].weight_format
            fits[device.id] = fit_device(_constants(_at_full_speed(device), weight_format), own)
            device = emulate(_fitted(_at_full_speed(device), fits[device.id], weight_format), device.speed)
        kept = fits[device.id].runs if own else frozenset[str]()
        left_out = {
            one.run
            for one in seen
            if one.hardware == hardware.get(device.id)
            and one.weight_format in ({own[0].weight_format} if own else weight_formats)
        } - kept
        devices.append(_with_left_out(device, len(left_out)) if left_out else device)
    links = tuple(_fitted_link(link, cluster, quiet, hardware) for link in cluster.links)
    calibrated = replace(cluster, devices=tuple(devices), links=links)
    return Calibrated(cluster=calibrated, fits=fits)


def _most_seen(
    device: Device,
    seen: Sequence[Observation],
    weight_formats: tuple[str, ...],
    hardware: Mapping[str, str],
) -> list[Observation]:
    """The device's observations in that of the formats which has most: bytes/s and overheads are one for all."""
    by_format = [
        [one for one in seen if one.hardware == hardware.get(device.id) and one.weight_format == name]
        for name in weight_formats
        if device.rate(name) is not None
    ]
    return max(by_format, key=len, default=[])


def _at_full_speed(device: Device) -> Device:
    return replace(emulate(device, 1 / device.speed), speed=1.0)


def _constants(device: Device, weight_format: str) -> Constants:
    flops_per_s = device.rate(weight_format)
    assert flops_per_s is not None
    return Constants(
        mem_bytes_per_s=device.mem_bytes_per_s,
        host_bytes_per_s=device.host_bytes_per_s,
        flops_per_s=flops_per_s,
        layer_overhead_s=device.layer_overhead_s,
        step_overhead_s=device.step_overhead_s,
    )


def _fitted(device: Device, fit: Fit, weight_format: str) -> Device:
    return replace(
        device,
        mem_bytes_per_s=fit.constants.mem_bytes_per_s,
        host_bytes_per_s=fit.constants.host_bytes_per_s,
        flops_per_s=device.flops_per_s | {weight_format: fit.constants.flops_per_s},
        layer_overhead_s=fit.constants.layer_overhead_s,
        step_overhead_s=fit.constants.step_overhead_s,
        source="measured",
        spread=Spread(
            decode=fit.decode_spread,
            prefill=fit.prefill_spread,
            source=f"calibrated from {_counted(len(fit.runs))} here",
        ),
    )


def _with_left_out(device: Device, number: int) -> Device:
    source = f"{device.spread.source}, {_counted(number)} left out as disturbed"
    return replace(device, spread=replace(device.spread, source=source))


def _counted(number: int) -> str:
    return f"{number} run{'s' if number > 1 else ''}"


def _quiet(seen: Sequence[Observation]) -> list[Observation]:
    by_hardware: dict[str, list[Observation]] = defaultdict(list)
    for one in seen:
        by_hardware[one.hardware].append(one)
    return [one for own in by_hardware.values() for one in undisturbed(own)]


def _fitted_link(
    link: Link, cluster: Cluster, seen: Sequence[Observation], hardware: Mapping[str, str]
) -> Link:
    """Runs show the link inside a host alone: reductions its latency, one sequence alone what a hop takes beside."""
    if link.src != link.dst:
        return link
    devices = {hardware[d.id] for d in cluster.devices if d.host == link.src and d.id in hardware}
    names = {link_hardware(name) for name in devices}
    latency_s = fit_latency_s(
        link.latency_s,
        link.bytes_per_s,
        [one for one in seen if one.phase == "link" and one.hardware in names],
    )
    hops = [one for one in seen if one.hardware in devices]
    return replace(link, latency_s=latency_s, hop_s=fit_hop_s(link.hop_s, latency_s, hops))
