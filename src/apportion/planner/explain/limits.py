"""What limits a plan and what would help it, from its own division alone: nothing is planned again.

A limit is the part of the objective that would go if one kind of work took no time; a hint's factor is what the same
stages would gain, and so the least that a new plan would.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from apportion.cost.estimate import objective_value
from apportion.cost.formats import weight_formats
from apportion.planner.explain.why import LINK_FACTOR, links_in_use
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.plan import Plan, Stage
from apportion.types.units import WEIGHT_BITS, format_bytes

_AT_ONCE = 1e12
"""Times as fast: what takes no time any more, and is still a number."""
LEAST_GAIN = 1.05
"""A hint that promises less is not worth a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """`part` of the objective's seconds is spent on `work`; `device_ids` are the stage where most of it is, all devices
    where there is one stage, and none for links."""

    work: str
    part: float
    device_ids: tuple[str, ...]
    stage_part: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """A `change` after which the same stages are so many times as fast."""

    change: str
    factor: float


def limits(plan: Plan) -> tuple[Limit, ...]:
    """The largest first; parts need not add up to one, as works overlap."""
    found = (_limit(plan, work, change) for work, change in _WORKS)
    linked = _part(plan, replace(plan.cluster, links=tuple(map(_at_once, plan.cluster.links))))
    exchange = Limit(work="messages between devices", part=linked, device_ids=(), stage_part=linked)
    return tuple(sorted((*found, exchange), key=lambda limit: -limit.part))


def hints(plan: Plan) -> tuple[Hint, ...]:
    """The most helpful first."""
    found = (
        hint
        for hint in (*_narrower_weights(plan), *_faster_links(plan), *_held(plan))
        if hint.factor >= LEAST_GAIN
    )
    return tuple(sorted(found, key=lambda hint: -hint.factor))


def _reads_at_once(device: Device) -> Device:
    return replace(device, mem_bytes_per_s=device.mem_bytes_per_s * _AT_ONCE, host_bytes_per_s=None)


def _computes_at_once(device: Device) -> Device:
    rates = {name: rate * _AT_ONCE for name, rate in device.flops_per_s.items()}
    return replace(device, flops_per_s=rates)


def _without_overhead(device: Device) -> Device:
    return replace(device, layer_overhead_s=0.0, step_overhead_s=0.0)


def _streams_at_once(device: Device) -> Device:
    rate = device.stream_bytes_per_s
    return device if rate is None else replace(device, stream_bytes_per_s=rate * _AT_ONCE)


_WORKS: tuple[tuple[str, Callable[[Device], Device]], ...] = (
    ("reading weights and KV cache from memory", _reads_at_once),
    ("arithmetic", _computes_at_once),
    ("the fixed time of every layer and step", _without_overhead),
    ("bringing layers that fit nowhere from host memory or disk", _streams_at_once),
)


def _at_once(link: Link) -> Link:
    return replace(link, latency_s=0.0, hop_s=0.0, bytes_per_s=link.bytes_per_s * _AT_ONCE)


def _limit(plan: Plan, work: str, change: Callable[[Device], Device]) -> Limit:
    by_stage = [_part(plan, _changed(plan, change, stage.split.device_ids)) for stage in plan.stages]
    most = max(range(len(by_stage)), key=by_stage.__getitem__)
    return Limit(
        work=work,
        part=_part(plan, _changed(plan, change, plan.device_ids)),
        device_ids=plan.stages[most].split.device_ids,
        stage_part=by_stage[most],
    )


def _changed(plan: Plan, change: Callable[[Device], Device], device_ids: tuple[str, ...]) -> Cluster:
    devices = (change(one) if one.id in device_ids else one for one in plan.cluster.devices)
    return replace(plan.cluster, devices=tuple(devices))


def _part(plan: Plan, cluster: Cluster) -> float:
    """Of the objective, that is gone with this cluster."""
    return 1 - _value(plan, cluster, plan.stages) / _value(plan, plan.cluster, plan.stages)


def _value(plan: Plan, cluster: Cluster, stages: tuple[Stage, ...]) -> float:
    return objective_value(
        plan.model,
        cluster,
        plan.workload.for_speed,
        stages,
        chunk_tokens=plan.chunk_tokens,
        microbatches=plan.microbatches,
    )


def _hint(plan: Plan, change: str, cluster: Cluster, stages: tuple[Stage, ...]) -> Hint:
    factor = _value(plan, plan.cluster, plan.stages) / _value(plan, cluster, stages)
    return Hint(change=change, factor=factor)


def _narrower_weights(plan: Plan) -> Iterator[Hint]:
    """int8 where weights are wider, else int4, which the engine of this machine's own devices does not run."""
    formats = plan.weight_formats_in_use
    if not all(name in WEIGHT_BITS for name in (*formats, *weight_formats(plan.model))):
        return  # as they are stored
    bits = max(WEIGHT_BITS[name] for name in formats)
    name = "int8" if bits > WEIGHT_BITS["int8"] else "int4"
    devices = [plan.cluster.device(device_id) for device_id in plan.device_ids]
    local = any(device.source == "measured" for device in devices)
    rated = all(device.rate(name) is not None for device in devices)
    if bits <= WEIGHT_BITS[name] or not rated or (name == "int4" and local):
        return
    stages = tuple(
        replace(stage, weight_format=name) if WEIGHT_BITS[stage.weight_format] > WEIGHT_BITS[name] else stage
        for stage in plan.stages
    )
    yield _hint(plan, f"--weights {name}", plan.cluster, stages)


def _faster_links(plan: Plan) -> Iterator[Hint]:
    for link in links_in_use(plan):
        if link.src == link.dst:
            continue
        better = replace(
            link, latency_s=link.latency_s / LINK_FACTOR, bytes_per_s=link.bytes_per_s * LINK_FACTOR
        )
        links = tuple(better if one is link else one for one in plan.cluster.links)
        name = f"a link {link.src}–{link.dst} {LINK_FACTOR:.0f}× as fast"
        yield _hint(plan, name, replace(plan.cluster, links=links), plan.stages)


def _held(plan: Plan) -> Iterator[Hint]:
    """Memory that would hold what is streamed now."""
    for number, stage in enumerate(plan.stages):
        if not stage.streamed_layers:
            continue
        held = replace(stage, streamed_layers=())
        stages = (*plan.stages[:number], held, *plan.stages[number + 1 :])
        streamed = {name: plan.memory[name].streamed_bytes for name in stage.split.device_ids}
        needs = " and ".join(f"{format_bytes(size)} more memory on {name}" for name, size in streamed.items())
        yield _hint(plan, needs, plan.cluster, stages)
