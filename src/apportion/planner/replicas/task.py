"""What replicas are planned for: sets of devices, shares of the sequences, ways of running, and what they may reach."""

from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apportion.planner.infeasible.error import least_bytes
from apportion.planner.problem import Problem, chunk_candidates, make_problem, useful_chunks
from apportion.planner.replicas.ceilings import Ceilings, Way
from apportion.planner.replicas.device_sets import DeviceSets, sequence_shares
from apportion.planner.stages.groups import Used
from apportion.planner.stages.kinds import kinds_of
from apportion.types.cluster import Cluster
from apportion.types.constraints import UNCONSTRAINED, Constraints
from apportion.types.model import ModelSpec
from apportion.types.workload import Workload

FloatArray = NDArray[np.float64]


class Item(NamedTuple):
    """A replica: the number of its set of devices, and of its share of the sequences."""

    set: int
    share: int


class RankedWay(NamedTuple):
    most: float
    """Tokens/s that it does not exceed."""
    way: Way


def of_replica(constraints: Constraints) -> Constraints:
    """As they are for one replica, whose part of the cluster has no excluded device."""
    return replace(constraints, excluded=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What replicas are planned for; `num_replicas` is None where any number may be best."""

    model: ModelSpec
    cluster: Cluster
    workload: Workload
    weight_formats: tuple[str, ...]
    num_replicas: int | None
    constraints: Constraints = UNCONSTRAINED

    @property
    def most_sequences(self) -> int:
        return self.workload.most_sequences or self.workload.concurrency

    @property
    def all_sequences(self) -> bool:
        """Whether all have to be given out: under limits as many are as they allow."""
        return not self.workload.limited

    def problem(self, cluster: Cluster, sequences: int, chunk_tokens: int) -> Problem:
        """Of one replica."""
        workload = self.share(sequences)
        constraints = self.constraints if cluster is self.cluster else of_replica(self.constraints)
        return make_problem(self.model, cluster, workload, self.weight_formats, chunk_tokens, constraints)

    def share(self, sequences: int) -> Workload:
        return replace(self.workload, concurrency=sequences, most_sequences=None)

    @property
    def smallest_chunk(self) -> int:
        return chunk_candidates(self.workload.max_context_tokens)[-1]


class ReplicaSets:
    """The sets and shares of a task, and what each is worth at most."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.sets = DeviceSets(task.cluster, task.constraints)
        self.kinds = kinds_of(task.model)
        self.shares = sequence_shares(task.most_sequences)
        self.ceilings = Ceilings(task.problem(task.cluster, 1, task.smallest_chunk), self.sets)
        self.ways = self.ceilings.ways(self.shares)
        self.most = np.where(self._possible(), self.ceilings.tokens_per_s(self.ways), -inf)
        """[set, way]: tokens/s that are not exceeded; −inf where the memory is too small for any division."""
        sequences = np.array([way.sequences for way in self.ways])
        self._of_share = [np.flatnonzero(sequences == share) for share in self.shares]
        alike: dict[object, int] = {}
        signatures = [self.sets.signature(tuple(counts)) for counts in self.sets.counts.tolist()]
        self.alike = np.array([alike.setdefault(key, number) for number, key in enumerate(signatures)])
        """By set the first that differs from it in names alone."""

    def worth(self) -> FloatArray:
        """[set, share]: at most, in the best way."""
        return np.stack([self.most[:, ways].max(axis=1) for ways in self._of_share], axis=1)

    def counts(self, item: Item) -> Used:
        return tuple(self.sets.counts[item.set].tolist())

    def item(self, cluster: Cluster, sequences: int) -> Item | None:
        """The set of these devices and this share, None where there is none."""
        ids = {device.id for device in cluster.devices}
        counts = [sum(device.id in ids for device in kind) for kind in self.sets.kinds]
        matching = np.flatnonzero((self.sets.counts == counts).all(axis=1))
        if len(matching) == 0 or sequences not in self.shares:
            return None
        return Item(int(matching[0]), self.shares.index(sequences))

    def first_alike(self, item: Item) -> Item:
        return Item(int(self.alike[item.set]), item.share)

    def ranked(self, item: Item) -> list[RankedWay]:
        """The ways that a search would choose among, the most promising first."""
        numbers = self._of_share[item.share]
        chunks = useful_chunks(self.task.workload)
        ranked = [RankedWay(float(self.most[item.set, n]), self.ways[n]) for n in numbers]
        chosen = [one for one in ranked if one.most > 0 and one.way.chunk_tokens in chunks]
        return sorted(chosen, key=lambda one: -one.most)

    def problems(self, item: Item, way: Way) -> list[Problem]:
        """With the coordinator on each of its hosts."""
        cluster = self.sets.cluster_of(self.counts(item))
        return list(self.task.problem(cluster, way.sequences, way.chunk_tokens).with_each_coordinator())

    def _possible(self) -> NDArray[np.bool_]:
        """[set, way]"""
        usable = np.array([kind[0].usable_bytes for kind in self.sets.kinds])
        room = (self.sets.counts @ usable)[:, None]
        task = self.task
        needed = {
            share: least_bytes(task.problem(task.cluster, share, task.smallest_chunk))
            for share in self.shares
        }
        microbatches = np.array([way.microbatches for way in self.ways])
        most_microbatches = 2 * self.sets.counts.sum(axis=1)[:, None]
        return (room >= [needed[way.sequences] for way in self.ways]) & (microbatches <= most_microbatches)
