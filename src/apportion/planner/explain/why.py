"""Why a plan is what it is: what would relieve its bottleneck, what each device adds, and why others are left out.

Every figure comes from planning again, on a cluster with the change.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from apportion.cost.estimate import objective_steps, plan_timings
from apportion.cost.objective import goal
from apportion.cost.traffic import coordinator_host, host_link
from apportion.planner.explain.forced import faster, forced_division, replan, with_device
from apportion.planner.problem import plan_problem, useful_chunks
from apportion.planner.stages.groups import device_kinds
from apportion.planner.weigh import Division, weigh
from apportion.types.cluster import Cluster, Link
from apportion.types.plan import Plan, Stage

FASTER = 1.25
MORE_MEMORY = 1.25
LINK_FACTOR = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Relief:
    """A change to one device or link, and the plan's objective over that with the change, less one."""

    change: str
    tokens_per_s: float
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One device: the best division without it where it is in use, with it where it is not; None where none is."""

    device_id: str
    division: Division | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    reliefs: tuple[Relief, ...]
    """The largest gain first."""
    losses: tuple[Part, ...]
    """Of each device in use."""
    left_out: tuple[Part, ...]
    """Each device that is not in use."""


def explain(plan: Plan) -> Why:
    unused = [device.id for device in plan.cluster.devices if device.id not in plan.device_ids]
    return Why(
        reliefs=tuple(sorted(_reliefs(plan), key=lambda relief: -relief.gain)),
        losses=tuple(_parts(plan, plan.device_ids, _without)),
        left_out=tuple(_parts(plan, unused, forced_division)),
    )


def _parts(
    plan: Plan, device_ids: Sequence[str], find: Callable[[Plan, str], Division | None]
) -> Iterator[Part]:
    """Devices that are alike in all but name are looked into once."""
    kinds = device_kinds(plan.cluster.devices, plan.constraints)
    first_of = {device.id: kind[0].id for kind in kinds for device in kind}
    found: dict[str, Division | None] = {}
    for name in device_ids:
        kind = first_of.get(name, name)
        if kind not in found:
            found[kind] = find(plan, name)
        yield Part(device_id=name, division=found[kind])


def _without(plan: Plan, device_id: str) -> Division | None:
    if device_id in plan.constraints.used:
        return None
    devices = tuple(device for device in plan.cluster.devices if device.id != device_id)
    return replan(plan, replace(plan.cluster, devices=devices)) if devices else None


def _reliefs(plan: Plan) -> Iterator[Relief]:
    for device_id in bottleneck_stage(plan).split.device_ids:
        device = plan.cluster.device(device_id)
        yield _relief(
            plan, f"{device_id} {FASTER - 1:.0%} faster", with_device(plan.cluster, faster(device, FASTER))
        )
    for link in links_in_use(plan):
        better = replace(
            link, latency_s=link.latency_s / LINK_FACTOR, bytes_per_s=link.bytes_per_s * LINK_FACTOR
        )
        links = tuple(better if one is link else one for one in plan.cluster.links)
        name = f"link inside {link.src}" if link.src == link.dst else f"link {link.src}–{link.dst}"
        yield _relief(plan, f"{name} {LINK_FACTOR:.0f}× faster", replace(plan.cluster, links=links))
    for device_id in full_devices(plan):
        device = plan.cluster.device(device_id)
        roomier = replace(device, memory_bytes=round(device.memory_bytes * MORE_MEMORY))
        yield _relief(
            plan, f"{device_id} {MORE_MEMORY - 1:.0%} more memory", with_device(plan.cluster, roomier)
        )


def _relief(plan: Plan, change: str, cluster: Cluster) -> Relief:
    """The plan's own stages remain possible, so the gain is never negative."""
    kept = weigh(replace(plan_problem(plan), cluster=cluster), plan.stages)
    found = replan(plan, cluster)
    better = found if found and found.value < kept.value else kept
    return Relief(
        change=change,
        tokens_per_s=better.estimate.tokens_per_s,
        gain=plan.certificate.value / better.value - 1,
    )


def bottleneck_stage(plan: Plan) -> Stage:
    """The stage that adds most to the objective: its occupied time under throughput, else all it adds."""
    steps = objective_steps(plan.workload, plan.chunk_tokens, plan.microbatches)
    weights = goal(plan.workload, plan.chunk_tokens, plan.microbatches)
    timings = plan_timings(plan.model, plan.cluster, plan.stages, steps).stages
    cost: Callable[[int], float] = (
        (lambda number: weights.occupied_s(timings[number]))
        if plan.workload.objective != "latency"
        else (lambda number: weights.path_s(timings[number]) + weights.occupied_s(timings[number]))
    )
    return plan.stages[max(range(len(plan.stages)), key=cost)]


def links_in_use(plan: Plan) -> tuple[Link, ...]:
    """Between stages, inside groups, and to and from a coordinator on another host."""
    cluster, home = plan.cluster, coordinator_host(plan.cluster)
    hosts = [cluster.device(stage.split.device_ids[0]).host for stage in plan.stages]
    pairs = list(pairwise(hosts))
    pairs += [(host, host) for host, stage in zip(hosts, plan.stages, strict=True) if stage.split.size > 1]
    pairs += [(home, host) for host in (hosts[0], hosts[-1]) if host != home]
    links = (host_link(cluster, src, dst) for src, dst in pairs)
    return tuple({(link.src, link.dst): link for link in links if link is not None}.values())


def full_devices(plan: Plan) -> tuple[str, ...]:
    """Those in use without room for their share of one more layer, and all where no chunk to choose among fits."""
    if plan.chunk_tokens not in useful_chunks(plan.workload):
        return plan.device_ids
    return tuple(
        device_id
        for stage in plan.stages
        for device_id in stage.split.device_ids
        if _headroom_bytes(plan, device_id) < _layer_bytes(plan, stage, device_id)
    )


def _headroom_bytes(plan: Plan, device_id: str) -> int:
    return plan.cluster.device(device_id).memory_bytes - plan.memory[device_id].total_bytes


def _layer_bytes(plan: Plan, stage: Stage, device_id: str) -> float:
    memory = plan.memory[device_id]
    return (memory.weights_bytes + memory.kv_bytes) / stage.num_layers
