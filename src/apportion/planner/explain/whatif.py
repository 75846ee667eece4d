"""What a plan would be with other devices, links or demands: its problem with changes applied, planned again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from apportion.cost.kv_capacity import with_most_kv
from apportion.cost.memory import kv_blocks
from apportion.cost.service import least_kv_tokens
from apportion.planner.build import make_plan
from apportion.planner.infeasible.constraints import without_device
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.constraints import UNCONSTRAINED, Constraints
from apportion.types.errors import ClusterError, PlanError, UsageError
from apportion.types.model import ModelSpec
from apportion.types.plan import Plan
from apportion.types.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkChange:
    """`name` joins two hosts, or two devices, by a dash; None is a figure that stays."""

    name: str
    bytes_per_s: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """None, or nothing, where it stays as it is."""

    remove: tuple[str, ...] = ()
    reserve: tuple[tuple[str, int], ...] = ()
    """Bytes kept unused on a device, beside those that are already."""
    memory: tuple[tuple[str, int], ...] = ()
    """What the engine may use of a device."""
    constraints: Constraints = UNCONSTRAINED
    """Beside those of the plan; stages by hand instead of its own."""
    add: tuple[Device, ...] = ()
    join: tuple[Link, ...] = ()
    """Of hosts without a link so far."""
    links: tuple[LinkChange, ...] = ()
    context_tokens: int | None = None
    concurrency: int | None = None
    weight_formats: tuple[str, ...] | None = None
    kv_format: str | None = None
    """"auto": as fits the weights."""
    streaming: bool = True
    """Whether layers may be streamed out of host memory where nothing fits without."""


Maker = Callable[[ModelSpec, Cluster, Workload, tuple[str, ...], Constraints], Plan]


def what_if(plan: Plan, changes: Changes, make: Maker | None = None) -> Plan:
    """The plan for the changed problem, by `make` where it is for another engine.

    Raises ClusterError for a name that is not known, UsageError where the demands do not go together, InfeasibleError
    where nothing fits any more.
    """
    unknown = set(plan.device_ids) - {device.id for device in plan.cluster.devices}
    if unknown:
        raise PlanError(
            f"the plan uses {', '.join(sorted(unknown))}, not in its cluster; see apportion verify"
        )
    weight_formats = changes.weight_formats or plan.weight_formats
    workload = _changed_workload(plan, changes)
    filled = plan.num_kv_blocks > kv_blocks(plan.workload, plan.block_tokens)
    if filled:  # as --kv-tokens max: planned for the least, then given what is left
        workload = replace(workload, kv_tokens=least_kv_tokens(workload))
    cluster = changed_cluster(plan.cluster, changes)
    constraints = changed_constraints(plan.constraints, changes)
    if make is None:
        streams = any(stage.streamed_layers for stage in plan.stages)
        streaming = changes.streaming and (streams or not constraints.stages)
        make = partial(make_plan, streaming=streaming)
    after = make(plan.model, cluster, workload, weight_formats, constraints)
    return with_most_kv(after) if filled else after


def changed_cluster(cluster: Cluster, changes: Changes) -> Cluster:
    """Devices removed, then added, then links changed. Raises ClusterError."""
    known = [device.id for device in cluster.devices]
    for device_id in changes.remove:
        if device_id not in known:
            raise ClusterError(f"no device '{device_id}' to remove; devices: {', '.join(known)}")
    devices = [device for device in cluster.devices if device.id not in changes.remove]
    for device in changes.add:
        if device.id in {other.id for other in devices}:
            raise ClusterError(
                f"there is a device '{device.id}' already; give the new one another name than {', '.join(known)}"
            )
        devices.append(device)
    if not devices:
        raise ClusterError(f"all {len(known)} devices are removed; keep one, or add one")
    links = [*cluster.links, *changes.join]
    devices = list(_resized(Cluster(devices=tuple(devices), links=()), changes).devices)
    for change in changes.links:
        link = _named_link(Cluster(devices=tuple(devices), links=tuple(links)), change.name)
        links[links.index(link)] = replace(
            link,
            bytes_per_s=link.bytes_per_s if change.bytes_per_s is None else change.bytes_per_s,
            latency_s=link.latency_s if change.latency_s is None else change.latency_s,
        )
    return replace(cluster, devices=tuple(devices), links=tuple(links))


def _resized(cluster: Cluster, changes: Changes) -> Cluster:
    for device_id, num_bytes in changes.memory:
        cluster = cluster.with_memory(device_id, num_bytes)
    for device_id, num_bytes in changes.reserve:
        cluster = cluster.with_reserve(device_id, num_bytes)
    return cluster


def changed_constraints(before: Constraints, changes: Changes) -> Constraints:
    """Those of the plan and the further ones. Raises UsageError for a device that is removed and has to take part."""
    asked = changes.constraints
    both = replace(
        before,
        use_all=before.use_all or asked.use_all,
        excluded=(*before.excluded, *(name for name in asked.excluded if name not in before.excluded)),
        pins=(*before.pins, *(pin for pin in asked.pins if pin not in before.pins)),
        stages=asked.stages or before.stages,
    )
    for device_id in changes.remove:
        both = without_device(both, device_id)
    return both


def _kv_format(before: str | None, asked: str | None) -> str | None:
    if asked is None:
        return before
    return None if asked == "auto" else asked


def _named_link(cluster: Cluster, name: str) -> Link:
    named = dict(_link_names(cluster))
    if name not in named:
        known = ", ".join(f"{link.src}-{link.dst}" for link in cluster.links)
        raise ClusterError(f"no link '{name}'; links: {known}")
    return named[name]


def _link_names(cluster: Cluster) -> Iterator[tuple[str, Link]]:
    """By device first, so that a host's name has precedence."""
    for one in cluster.devices:
        for other in cluster.devices:
            link = cluster.link(one.id, other.id)
            if one is not other and link is not None:
                yield f"{one.id}-{other.id}", link
    for link in cluster.links:
        yield f"{link.dst}-{link.src}", link
        yield f"{link.src}-{link.dst}", link


def _changed_workload(plan: Plan, changes: Changes) -> Workload:
    context = changes.context_tokens or plan.workload.max_context_tokens
    if context > plan.model.max_context_tokens:
        raise UsageError(
            f"--context {context} is more than {plan.model.name}'s {plan.model.max_context_tokens}"
        )
    typical = plan.workload.prompt_tokens + plan.workload.output_tokens
    if typical > context:
        raise UsageError(
            f"the plan's prompts of {plan.workload.prompt_tokens} and outputs of {plan.workload.output_tokens} tokens "
            f"do not fit in --context {context}; give at least {typical}, or make a plan for shorter ones"
        )
    return replace(
        plan.workload,
        max_context_tokens=context,
        concurrency=changes.concurrency or plan.workload.concurrency,
        kv_format=_kv_format(plan.workload.kv_format, changes.kv_format),
        most_sequences=plan.workload.most_sequences if changes.concurrency is None else None,
        arrival_rate=plan.workload.arrival_rate if changes.concurrency is None else None,
    )
