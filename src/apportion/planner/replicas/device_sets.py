"""Sets of devices that a replica may have, and shares of the sequences.

Devices alike in all but name are interchangeable, so a set is how many it has of each kind; two sets that differ in
nothing but the names of their hosts are worth the same.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from apportion.cost.host_memory import reading
from apportion.cost.traffic import host_link
from apportion.planner.stages.groups import Used, device_figures, device_kinds
from apportion.types.cluster import Cluster, Device
from apportion.types.constraints import UNCONSTRAINED, Constraints

IntArray = NDArray[np.int64]

MAX_PARTS = 16
"""Into which the sequences are shared out: of more sequences, parts are of several."""


def sub_cluster(cluster: Cluster, devices: Sequence[Device]) -> Cluster:
    """These devices, in this order, and the links between their hosts; the other devices are at work all the time."""
    hosts = {device.host for device in devices}
    links = tuple(link for link in cluster.links if {link.src, link.dst} <= hosts)
    others = [device for device in cluster.devices if device not in devices]
    beside = {host: reading(host, others) for host in sorted(hosts)}
    return Cluster(
        devices=tuple(devices),
        links=links,
        others_bytes_per_s={host: rates for host, rates in beside.items() if rates[0]},
    )


def sequence_shares(sequences: int) -> tuple[int, ...]:
    """What one replica may have of them: multiples of their `MAX_PARTS`-th part, rounded up; one takes the rest too."""
    part = -(-sequences // MAX_PARTS)
    whole, rest = divmod(sequences, part)
    multiples = [part * number for number in range(whole + 1)]
    return tuple(sorted({*multiples, *(count + rest for count in multiples)} - {0}))


class DeviceSets:
    """All non-empty sets, numbered; `counts[set, kind]` devices of each kind."""

    def __init__(self, cluster: Cluster, constraints: Constraints = UNCONSTRAINED) -> None:
        self.cluster = cluster
        self.kinds = device_kinds(cluster.devices, constraints)
        self.available = tuple(len(kind) for kind in self.kinds)

    @property
    def num_sets(self) -> int:
        """Counted, not listed: there may be too many."""
        return int(np.prod([float(count + 1) for count in self.available])) - 1

    @cached_property
    def counts(self) -> IntArray:
        ranges = [range(count + 1) for count in self.available]
        return np.array([counts for counts in product(*ranges) if any(counts)], dtype=np.int64)

    def cluster_of(self, counts: Used, taken: Used | None = None) -> Cluster:
        """So many devices of each kind, after those that are taken."""
        before = taken or (0,) * len(counts)
        devices = [
            device
            for kind, skipped, count in zip(self.kinds, before, counts, strict=True)
            for device in kind[skipped : skipped + count]
        ]
        return sub_cluster(self.cluster, devices)

    def signature(self, counts: Used) -> object:
        """Equal where two sets differ in names alone."""
        everyone = self.cluster.devices
        used = [(kind[0], count) for kind, count in zip(self.kinds, counts, strict=True) if count]
        hosts = list(dict.fromkeys(device.host for device, _ in used))
        links = [
            (link.latency_s, link.bytes_per_s, link.hop_s)
            if (link := host_link(self.cluster, src, dst))
            else None
            for number, src in enumerate(hosts)
            for dst in hosts[number:]
        ]
        figures = [
            (hosts.index(device.host), device_figures(device), reading(device.host, everyone), count)
            for device, count in used
        ]
        return (tuple(figures), tuple(links))
