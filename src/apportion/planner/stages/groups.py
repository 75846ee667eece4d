"""Groups of devices that a stage may be given to, and which of them are alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf

from apportion.cost.host_memory import at_work
from apportion.cost.traffic import host_link
from apportion.planner.problem import Problem
from apportion.planner.stages.axes import ffn_granule
from apportion.planner.stages.places import allowed_ranges, fixed_shares
from apportion.types.cluster import Device, Link
from apportion.types.constraints import UNCONSTRAINED, Constraints

Used = tuple[int, ...]
"""How many devices of each kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A tensor-parallel group as kinds of devices; a single device is a group of one."""

    counts: Used
    devices: tuple[Device, ...]
    """Representatives in rank order, which is the cluster's order of kinds."""

    @property
    def host(self) -> str:
        return self.devices[0].host

    @property
    def size(self) -> int:
        return len(self.devices)


def device_figures(device: Device) -> tuple[object, ...]:
    """All that a device's part in a plan depends on, but for its host."""
    rates = tuple(sorted(device.flops_per_s.items()))
    memory = (device.memory_bytes, device.reserved_bytes)
    overheads = (device.layer_overhead_s, device.step_overhead_s)
    shared = (device.host_bytes_per_s, device.speed, device.num_threads, device.host_cores)
    return (
        device.kind,
        *memory,
        device.mem_bytes_per_s,
        device.stream_bytes_per_s,
        device.stream_from,
        device.cache,
        rates,
        *overheads,
        shared if device.host_bytes_per_s is not None else None,
    )


def device_kinds(
    devices: Sequence[Device], constraints: Constraints = UNCONSTRAINED
) -> tuple[tuple[Device, ...], ...]:
    """Devices alike in all but name, host by host, those with the most memory, then bandwidth first, whatever order
    they were named in; told apart, but next to each other, where the constraints do. Excluded ones are left out."""
    kinds: dict[object, dict[object, list[Device]]] = {}
    for device in devices:
        if device.id not in constraints.excluded:
            alike = kinds.setdefault((device.host, device_figures(device)), {})
            alike.setdefault(_mark(device.id, constraints), []).append(device)
    hosts = list(dict.fromkeys(device.host for device in devices))

    def place(alike: dict[object, list[Device]]) -> tuple[int, int, float, str]:
        first = next(iter(alike.values()))[0]
        size, bandwidth = first.memory_bytes, first.mem_bytes_per_s
        return hosts.index(first.host), -size, -bandwidth, repr(device_figures(first))

    return tuple(tuple(members) for alike in sorted(kinds.values(), key=place) for members in alike.values())


def _mark(device_id: str, constraints: Constraints) -> object:
    """What the constraints tell a device from others by: those of a stage whose shares are free are alike."""
    stage = constraints.stage_of(device_id)
    pins = tuple((pin.layer_start, pin.layer_stop) for pin in constraints.pins if pin.device_id == device_id)
    tied = any(start < stop for start, stop in pins)
    return stage, pins, device_id if tied or (stage and stage.shares) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """What a search counts of the devices in use: how many of each kind, and of those that are tied to layers
    (stages/places.py) how many of each host."""

    hosts: tuple[str, ...]
    available: Used
    least: Used
    """That have to take part."""
    of_kind: tuple[int, ...]

    def used(self, counts: Used) -> Used:
        """By axis, of counts by kind."""
        used = [0] * len(self.available)
        for axis, count in zip(self.of_kind, counts, strict=True):
            used[axis] += count
        return tuple(used)


def device_axes(problem: Problem) -> Axes:
    constraints = problem.constraints
    kinds = device_kinds(problem.cluster.devices, constraints)
    tied = {name for one in constraints.tied for name in one.device_ids}
    keys = [("tied", kind[0].host) if kind[0].id in tied else kind[0].id for kind in kinds]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    of_kind = tuple(numbers[key] for key in keys)
    hosts, available, least = [""] * len(numbers), [0] * len(numbers), [0] * len(numbers)
    for axis, kind in zip(of_kind, kinds, strict=True):
        hosts[axis] = kind[0].host
        available[axis] += len(kind)
        least[axis] += len(kind) if constraints.use_all or kind[0].id in constraints.used else 0
    return Axes(hosts=tuple(hosts), available=tuple(available), least=tuple(least), of_kind=of_kind)


def possible_groups(problem: Problem) -> tuple[Group, ...]:
    """Every multiset of device kinds on one host that the constraints allow, of no more members than KV heads and FFN
    granules, with a link, cores and a weight format for all."""
    hosts = dict.fromkeys(device.host for device in problem.cluster.devices)
    return tuple(group for host in hosts for group in _host_groups(problem, host))


def _host_groups(problem: Problem, host: str) -> Iterator[Group]:
    most = min(problem.model.kv_heads, _num_granules(problem), problem.max_devices or inf)
    joined = host_link(problem.cluster, host, host) is not None
    kinds = device_kinds(problem.cluster.devices, problem.constraints)
    for counts in _host_counts(problem.constraints, kinds, host):
        size = sum(counts)
        if size and _allowed(problem, size) and (size == 1 or (joined and size <= most)):
            devices = tuple(d for kind, count in zip(kinds, counts, strict=True) for d in kind[:count])
            if _have_cores(problem, devices) and _is_possible(problem, devices):
                yield Group(counts=counts, devices=devices)


def _host_counts(constraints: Constraints, kinds: Sequence[Sequence[Device]], host: str) -> Iterator[Used]:
    """So many of each kind of a host; the devices of a stage by hand together alone."""
    here = [kind[0].host == host for kind in kinds]
    stages = [constraints.stage_of(kind[0].id) for kind in kinds]
    free = [inside and stage is None for inside, stage in zip(here, stages, strict=True)]
    yield from product(
        *(range(len(kind) + 1 if inside else 1) for kind, inside in zip(kinds, free, strict=True))
    )
    for one in constraints.stages:
        members = [inside and stage is one for inside, stage in zip(here, stages, strict=True)]
        yield tuple(len(kind) if member else 0 for kind, member in zip(kinds, members, strict=True))


def _allowed(problem: Problem, size: int) -> bool:
    """Whether the constraints know groups of this size."""
    engine = problem.constraints.engine
    if engine is not None and size != engine.group_size:
        return False
    if size == 1:
        return True
    if problem.constraints.groups != "even":
        return problem.constraints.groups == "any"
    return problem.model.kv_heads % size == 0 and _num_granules(problem) % size == 0


def _num_granules(problem: Problem) -> int:
    return problem.model.ffn_columns // ffn_granule(problem.model)


def _is_possible(problem: Problem, devices: Sequence[Device]) -> bool:
    """Whether its members have a weight format in common and, where any are tied to layers, the same place."""
    tied = not problem.constraints.tied or bool(allowed_ranges(problem, devices).any())
    return tied and len(common_formats(problem.weight_formats, devices)) > 0


def common_formats(weight_formats: Sequence[str], devices: Sequence[Device]) -> tuple[str, ...]:
    """Those that every device has a rate for."""
    return tuple(name for name in weight_formats if all(device.rate(name) is not None for device in devices))


def _have_cores(problem: Problem, devices: Sequence[Device]) -> bool:
    """Members of a group compute at the same time: without a core for each thread they would wait for each other, and
    for the host's other CPU devices."""
    cpus = [device for device in devices if device.kind == "cpu"]
    if len(cpus) <= 1 or cpus[0].host_cores is None:
        return True
    beside = [d for d in problem.cluster.devices if d.host == cpus[0].host and d.kind == "cpu"]
    return sum(device.num_threads for device in beside) <= cpus[0].host_cores


def group_link(problem: Problem, group: Group) -> Link | None:
    return host_link(problem.cluster, group.host, group.host) if group.size > 1 else None


def first_alike(problem: Problem, groups: Sequence[Group]) -> list[int]:
    """By group the number of the first that is the same but for its host: they cost the same."""
    first: dict[object, int] = {}
    alike: list[int] = []
    for number, group in enumerate(groups):
        link = group_link(problem, group)
        devices = at_work(problem.cluster, group.devices, overlapping=True)
        figures = tuple(device_figures(device) for device in (*group.devices, *devices))
        shares = fixed_shares(problem, group.devices)
        key = (figures, (link.latency_s, link.bytes_per_s) if link else None, shares)
        alike.append(first.setdefault(key, number))
    return alike
