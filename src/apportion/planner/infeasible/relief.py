"""Changes that each make an infeasible problem feasible, the cheapest of every sort, all of them tried."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from apportion.cost.formats import weight_formats
from apportion.cost.service import least_kv_tokens
from apportion.planner.stages.groups import device_kinds
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.constraints import UNCONSTRAINED, Constraints
from apportion.types.errors import ClusterError
from apportion.types.model import ModelSpec
from apportion.types.units import format_bytes
from apportion.types.workload import Workload

WeightFormats = tuple[str, ...]
Fits = Callable[[ModelSpec, Cluster, Workload, WeightFormats], bool]
MIN_CONTEXT_TOKENS = 64
MEMORY_STEP_BYTES = 2**28
"""More memory is told in quarters of a GiB, or in 64ths of what the device has where that is less."""
MAX_MEMORY_FACTOR = 64
MAX_KINDS = 16
"""Of devices: with more of them only the largest are tried with more memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What does not fit. `cards` could be bought, in ascending order of memory."""

    model: ModelSpec
    cluster: Cluster
    workload: Workload
    weight_formats: WeightFormats
    fits: Fits
    fits_streamed: Fits | None = None
    """Where streaming layers was not allowed."""
    cards: Sequence[Device] = ()
    constraints: Constraints = UNCONSTRAINED
    """That `fits` keeps."""

    def holds(self, **changed: object) -> bool:
        """Whether it fits with some fields changed; devices that lack a rate make it not."""
        one = replace(self, **changed)  # pyright: ignore[reportArgumentType]
        try:
            return self.fits(one.model, one.cluster, one.workload, one.weight_formats)
        except ClusterError:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoreMemory:
    """The least that one device alone needs more."""

    device: Device
    more_bytes: int


def least_memory(demand: Demand) -> list[MoreMemory]:
    """By device, one of those that are alike, for those whose memory alone makes it fit; the least first."""
    alike = [kind[0] for kind in device_kinds(demand.cluster.devices, demand.constraints)]
    largest = sorted(alike, key=lambda device: -device.usable_bytes)[:MAX_KINDS]
    found = [_least_memory(demand, device) for device in largest]
    return sorted((one for one in found if one), key=lambda one: one.more_bytes)


def _least_memory(demand: Demand, device: Device) -> MoreMemory | None:
    step = max(1, min(MEMORY_STEP_BYTES, device.memory_bytes // 64))
    steps = range(1, MAX_MEMORY_FACTOR * device.memory_bytes // step + 1)

    def holds(number: int) -> bool:
        larger = replace(device, memory_bytes=device.memory_bytes + number * step)
        devices = tuple(larger if one is device else one for one in demand.cluster.devices)
        return demand.holds(cluster=replace(demand.cluster, devices=devices))

    if not holds(steps[-1]):
        return None
    return MoreMemory(device=device, more_bytes=step * steps[bisect_left(steps, True, key=holds)])


def changes(demand: Demand, memory: Sequence[MoreMemory]) -> Iterator[str]:
    """As a user would write or do them."""
    if demand.fits_streamed is not None and replace(demand, fits=demand.fits_streamed).holds():
        yield "--stream auto"
    yield from _less_asked(demand)
    yield from (_more_memory(one) for one in memory[:2])
    yield from _one_more_card(demand)
    yield from _one_more_host(demand)
    yield from _missing_links(demand)


def _less_asked(demand: Demand) -> Iterator[str]:
    context = demand.workload.max_context_tokens // 2
    while context >= MIN_CONTEXT_TOKENS:
        if demand.holds(workload=_with_context(demand.workload, context)):
            yield f"--context {context}"
            break
        context //= 2
    fewer = range(demand.workload.concurrency - 1, 0, -1)
    if fewer and demand.holds(workload=replace(demand.workload, concurrency=1)):
        most = bisect_left(
            fewer, True, key=lambda n: demand.holds(workload=replace(demand.workload, concurrency=n))
        )
        yield f"--concurrency {fewer[most]}"
    yield from _less_kv(demand)
    yield from _narrower_kv(demand)
    known = weight_formats(demand.model)
    narrowest = min(known[name] for name in demand.weight_formats)
    for smaller, bits in known.items():
        if bits < narrowest and demand.holds(weight_formats=(smaller,)):
            yield f"--weights {smaller}"
            break


def _less_kv(demand: Demand) -> Iterator[str]:
    """KV cache for sequences by their actual lengths, with room for all typical requests."""
    workload = demand.workload
    whole, least = workload.concurrency * workload.max_context_tokens, least_kv_tokens(workload)
    if workload.kv_tokens is not None or least >= whole:
        return
    halves = (whole >> times for times in range(1, 8))
    for tokens in (*(half for half in halves if half > least), least):
        if demand.holds(workload=replace(workload, kv_tokens=tokens)):
            yield f"--kv-tokens {tokens}"
            break


def _narrower_kv(demand: Demand) -> Iterator[str]:
    """On CPUs alone; GPUs' keys and values are as their hidden states."""
    if demand.workload.kv_format not in (None, "fp32"):
        return
    cpus = all(device.kind == "cpu" for device in demand.cluster.devices)
    if cpus and demand.holds(workload=replace(demand.workload, kv_format="fp16")):
        yield "--kv-format fp16"


def _with_context(workload: Workload, context: int) -> Workload:
    return replace(
        workload,
        max_context_tokens=context,
        prompt_tokens=min(workload.prompt_tokens, context // 2),
        output_tokens=min(workload.output_tokens, context // 4),
    )


def _more_memory(one: MoreMemory) -> str:
    """Memory of a whole computer is bought with it."""
    if _is_whole_computer(one.device):
        return f"{one.device.id} in a variant with {format_bytes(one.device.memory_bytes + one.more_bytes)} of memory"
    return f"{format_bytes(one.more_bytes)} more on {one.device.id}"


def _is_whole_computer(device: Device) -> bool:
    """A GPU whose memory is its system's (Apple, Strix Halo, Jetson): nothing can be added to it."""
    return device.in_host_memory and device.kind != "cpu"


def _hosts_with_slots(cluster: Cluster) -> list[str]:
    closed = {device.host for device in cluster.devices if _is_whole_computer(device)}
    return [host for host in dict.fromkeys(device.host for device in cluster.devices) if host not in closed]


def _one_more_host(demand: Demand) -> Iterator[str]:
    """Where no host takes a card: a computer with the card of least memory that makes it fit, on a link of 1 Gbit/s."""
    first = demand.cluster.devices[0].host
    if _hosts_with_slots(demand.cluster) or not demand.cards:
        return

    def holds(card: Device) -> bool:
        other = replace(card, id=f"one more {card.id}", host="one more host")
        link = Link(src=first, dst=other.host, latency_s=1e-3, bytes_per_s=1.25e8)
        devices, links = (*demand.cluster.devices, other), (*demand.cluster.links, link)
        return demand.holds(cluster=replace(demand.cluster, devices=devices, links=links))

    card = next((card for card in demand.cards if holds(card)), None)
    if card is not None:
        yield f"one more host with {card.id} or larger, joined by 1 Gbit/s"


def _one_more_card(demand: Demand) -> Iterator[str]:
    """The card with the least memory that makes it fit, on the first host where it does."""
    hosts = _hosts_with_slots(demand.cluster)

    def holds(card: Device, host: str) -> bool:
        devices = (*demand.cluster.devices, replace(card, id=f"one more {card.id}", host=host))
        return demand.holds(cluster=replace(demand.cluster, devices=devices))

    useful = [host for host in hosts if demand.cards and holds(demand.cards[-1], host)]
    for card in demand.cards if useful else ():
        host = next((host for host in useful if holds(card, host)), None)
        if host is not None:
            yield f"one more card on {host}, {card.id} or larger"
            return


def _missing_links(demand: Demand) -> Iterator[str]:
    """A link of 1 Gbit/s that alone makes it fit."""
    hosts = dict.fromkeys(device.host for device in demand.cluster.devices)
    joined = {frozenset((link.src, link.dst)) for link in demand.cluster.links}
    for pair in combinations(hosts, 2):
        link = Link(src=pair[0], dst=pair[1], latency_s=1e-3, bytes_per_s=1.25e8)
        if frozenset(pair) not in joined and demand.holds(
            cluster=replace(demand.cluster, links=(*demand.cluster.links, link))
        ):
            yield f"a link {pair[0]}-{pair[1]}"
