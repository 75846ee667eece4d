"""Upper bounds on the tokens/s of a replica, cheap enough for every set of devices and share of the sequences.

A replica of c sequences in P microbatches of b = ⌈c/P⌉ that draws q tokens/s puts f of them a second through the layers
of a group. Each sort of layer, and the head, is a part of its own: over the groups Σ f = q for each. With p and d the
group's seconds for a part of a whole prompt and decode step (replicas/work.py) and o tokens of output, a token keeps it
busy for at least U = (A·p + B·d(b))/(c·o), and takes V = (a·p + b·d(b))/o on its way, with the weights of occupation
and path of cost/objective.py; no more than c sequences' worth go on at once:

    Σ_{parts} f·U ≤ 1 for every group,    Σ f·V ≤ c.

By linear duality, with any weights π of the parts that add up to 1, any price ζ of a sequence and prices η of devices
for which Σ_{group} η ≥ (π − ζ·V)/U for every part, q ≤ Σ_{devices} η + ζ·c. The weights are the parts' times were they
shared by all devices; what a stage takes once counts by these weights too. A group's price is shared among its members
by their speed, and the best of some ζ is taken. Where devices of several hosts work together, hidden states cross the
cheapest link between them at least once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.cost.objective import Serving, Timing, microbatch_sequences
from apportion.planner.problem import Problem, chunk_candidates
from apportion.planner.replicas.device_sets import DeviceSets
from apportion.planner.replicas.work import GroupWork, Work
from apportion.planner.stages.groups import Group, possible_groups
from apportion.types.workload import Workload

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

NUM_PRICES = 24
"""Of a sequence, that are tried; the bound holds for each."""
ROUNDING = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class Way:
    """Of running a replica."""

    chunk_tokens: int
    sequences: int
    microbatches: int

    @property
    def microbatch(self) -> int:
        return microbatch_sequences(self.sequences, self.microbatches)


@dataclass(frozen=True, slots=True)
class Load:
    """What a way asks of its devices; of several ways alike in chunk and microbatch, the least."""

    chunk_tokens: int
    microbatch: int
    beside: int
    busy: tuple[float, float]
    """Weights of (prefill, decode) seconds per token drawn."""
    passing: tuple[float, float]

    @staticmethod
    def of(workload: Workload, chunk_tokens: int, microbatch: int, ways: Sequence[tuple[int, int]]) -> "Load":
        """`ways` by (sequences, microbatches)."""
        sequences, microbatches = np.array(ways).T
        num_chunks = np.array(-(-workload.prompt_tokens // chunk_tokens))
        serving = Serving(
            output_tokens=workload.output_tokens,
            num_chunks=num_chunks,
            sequences=sequences,
            microbatches=microbatches,
        )
        output = workload.output_tokens
        busy = [float((weight / sequences).min()) / output for weight in serving.occupied]
        passing = [float(weight.min()) / output for weight in serving.path]
        beside = int(serving.beside.min())
        return Load(chunk_tokens, microbatch, beside, (busy[0], busy[1]), (passing[0], passing[1]))


@dataclass(frozen=True, slots=True)
class Seconds:
    """`busy[part, group, way]` and `passing[part, group, way]` are U and V above, over the part's weight."""

    busy: FloatArray
    passing: FloatArray
    speed: FloatArray
    """[kind, way]: tokens/s of one device alone, by which a group's price is shared."""
    together: FloatArray
    """[group, way]: of all members of a group."""

    def rate(self, price: float | FloatArray) -> FloatArray:
        """[group, way]: what a device costs for each token/s of its own, so that the group costs enough."""
        needed = np.maximum(1 - price * self.passing, 0.0) / self.busy
        return needed.max(axis=0) / self.together


@dataclass(frozen=True, slots=True)
class Crossing:
    """`busy[set, way]` and `passing[set, way]` seconds of the cheapest link between two of a set's hosts."""

    busy: FloatArray
    passing: FloatArray


class HostSets:
    """The sets of one host's devices: what is left of all sets, without the other hosts'."""

    def __init__(self, sets: DeviceSets, host: str, groups: Sequence[Group]) -> None:
        self.kinds = [number for number, kind in enumerate(sets.kinds) if kind[0].host == host]
        counts, of_set = np.unique(sets.counts[:, self.kinds], axis=0, return_inverse=True)
        self.counts: IntArray = counts
        """In lexical order: what is less by a device comes before."""
        self.of_set: IntArray = of_set.reshape(-1)
        """The number of a set's part on this host."""
        self.num_sets = len(counts)
        numbers = {tuple(row): number for number, row in enumerate(counts.tolist())}
        held = [tuple(group.counts[kind] for kind in self.kinds) for group in groups]
        here = [number for number, group in enumerate(groups) if group.host == host]
        self._group = {numbers[held[number]]: number for number in here}
        self._less = [
            [numbers[less] for less in _one_less(tuple(row)) if less in numbers] for row in counts.tolist()
        ]

    def costs(self, seconds: Seconds, price: FloatArray) -> FloatArray:
        """[set of this host, way]: of its devices, each as in the dearest group that the set allows."""
        rate = seconds.rate(price)
        dearest = np.zeros((self.num_sets, len(self.kinds), rate.shape[1]))
        for number, less in enumerate(self._less):
            for fewer in less:
                np.maximum(dearest[number], dearest[fewer], out=dearest[number])
            if number in self._group:
                held = self.counts[number] > 0
                dearest[number, held] = np.maximum(dearest[number, held], rate[self._group[number]])
        speed = seconds.speed[self.kinds]
        return np.einsum("skw,kw,sk->sw", dearest, speed, self.counts.astype(float))


def _one_less(counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(*counts[:place], count - 1, *counts[place + 1 :]) for place, count in enumerate(counts) if count]


class Ceilings:
    def __init__(self, problem: Problem, sets: DeviceSets) -> None:
        self.problem = problem
        self.sets = sets
        self.groups: tuple[Group, ...] = possible_groups(problem)
        self.hosts = list(dict.fromkeys(kind[0].host for kind in sets.kinds))
        self._work = GroupWork(problem, self.groups)
        self._prefills: dict[tuple[int, int], Work] = {}
        self._decodes: dict[int, Work] = {}
        self._hops: dict[tuple[str, str, int, int, int], Timing | None] = {}
        counts = np.array([group.counts for group in self.groups])
        self._counts: FloatArray = counts.astype(float)
        self._held: NDArray[np.bool_] = counts > 0
        """[group, kind]"""
        singles = {int(np.argmax(row)): number for number, row in enumerate(counts) if row.sum() == 1}
        self._singles = [singles[kind] for kind in range(len(sets.kinds))]
        """The group of one device of each kind."""

    def ways(self, shares: Sequence[int]) -> list[Way]:
        """All that a replica with one of these shares of the sequences may be run in."""
        return [
            Way(chunk, sequences, microbatches)
            for chunk in self._chunks()
            for sequences in shares
            for microbatches in self._microbatches(sequences)
        ]

    def tokens_per_s(self, ways: Sequence[Way]) -> FloatArray:
        """[set, way]: what no replica of these devices, run in this way, exceeds."""
        loads = [self._load(way) for way in ways]
        seconds = self._group_seconds(loads)
        sequences = np.array([way.sequences for way in ways], dtype=float)
        hosts = [HostSets(self.sets, host, self.groups) for host in self.hosts]
        alone = [np.full((host.num_sets, len(ways)), inf) for host in hosts]
        together = np.full((len(self.sets.counts), len(ways)), inf)
        crossing = self._crossing(hosts, loads)
        for price in self._prices(seconds):
            costs = [host.costs(seconds, price) for host in hosts]
            for least, cost in zip(alone, costs, strict=True):
                np.minimum(least, cost + price * sequences, out=least)
            whole = sum(cost[host.of_set] for host, cost in zip(hosts, costs, strict=True))
            np.minimum(together, (whole + price * sequences) / (1 + price * crossing.passing), out=together)
        most = np.max([least[host.of_set] for host, least in zip(hosts, alone, strict=True)], axis=0)
        return ROUNDING * np.maximum(most, np.minimum(together, 1 / crossing.busy))

    def of_all(self, sequences: int) -> tuple[FloatArray, float]:
        """Prices of a device of each kind and of a sequence: no replicas, however many, make more tokens/s together
        than their devices and sequences cost."""
        by_microbatch: dict[int, list[tuple[int, int]]] = {}
        for number in range(1, sequences + 1):
            for microbatches in range(1, number + 1):
                alike = by_microbatch.setdefault(microbatch_sequences(number, microbatches), [])
                alike.append((number, microbatches))
        seconds = self._group_seconds(
            [
                Load.of(self.problem.workload, chunk, microbatch, alike)
                for chunk in self._chunks()
                for microbatch, alike in by_microbatch.items()
            ]
        )
        slowest, fastest = float(seconds.passing.max()), float(seconds.passing.min())
        prices: FloatArray = np.append(0.0, np.geomspace(1 / slowest, 1 / fastest, 64))
        devices = np.array([self._dearest(seconds, price).max(axis=1) for price in prices])
        total = devices @ np.array(self.sets.available) + sequences * prices
        best = int(total.argmin())
        return ROUNDING * devices[best], ROUNDING * float(prices[best])

    def _chunks(self) -> tuple[int, ...]:
        return chunk_candidates(self.problem.workload.max_context_tokens)

    def _microbatches(self, sequences: int) -> range:
        """As many as all devices together may have."""
        return range(1, min(sequences, 2 * len(self.problem.cluster.devices)) + 1)

    def _load(self, way: Way) -> Load:
        one = [(way.sequences, way.microbatches)]
        return Load.of(self.problem.workload, way.chunk_tokens, way.microbatch, one)

    def _group_seconds(self, loads: Sequence[Load]) -> Seconds:
        busy: list[FloatArray] = []
        passing: list[FloatArray] = []
        speed: list[FloatArray] = []
        for load in loads:
            prefill, decode = self._prefill(load.chunk_tokens, load.beside), self._decode(load.microbatch)
            per_prompt, per_step = load.busy
            parts = per_prompt * prefill.parts + per_step * decode.parts
            weights = 1 / (1 / parts[:, self._singles]).sum(axis=1)
            weights = (weights / weights.sum())[:, None]
            busy.append(parts / weights + per_prompt * prefill.once + per_step * decode.once)
            per_prompt, per_step = load.passing
            on_its_way = per_prompt * prefill.parts + per_step * decode.parts
            passing.append(on_its_way / weights + per_prompt * prefill.once + per_step * decode.once)
            speed.append(1 / (weights * busy[-1]).sum(axis=0)[self._singles])
        speeds = np.stack(speed, axis=1)
        return Seconds(np.stack(busy, axis=2), np.stack(passing, axis=2), speeds, self._counts @ speeds)

    def _crossing(self, hosts: Sequence[HostSets], loads: Sequence[Load]) -> Crossing:
        used = np.array([host.counts[host.of_set].any(axis=1) for host in hosts]).T
        busy = np.full((len(used), len(loads)), inf)
        passing = busy.copy()
        for (one, src), (other, dst) in combinations(enumerate(self.hosts), 2):
            both = used[:, one] & used[:, other]
            seconds = np.array([self._hop(src, dst, load) for load in loads])
            busy[both] = np.minimum(busy[both], seconds[:, 0])
            passing[both] = np.minimum(passing[both], seconds[:, 1])
        return Crossing(busy, np.where(np.isinf(passing), 0.0, passing))

    def _hop(self, src_host: str, dst_host: str, load: Load) -> tuple[float, float]:
        key = (src_host, dst_host, load.chunk_tokens, load.microbatch, load.beside)
        if key not in self._hops:
            self._hops[key] = self._work.hop(*key)
        hop = self._hops[key]
        if hop is None:
            return inf, inf
        busy_s, passing_s = (
            prefill * hop.prefill_s + decode * hop.decode_s for prefill, decode in (load.busy, load.passing)
        )
        return busy_s, passing_s

    def _prefill(self, chunk_tokens: int, beside: int) -> Work:
        key = (chunk_tokens, beside)
        if key not in self._prefills:
            self._prefills[key] = self._work.prefill(chunk_tokens, beside)
        return self._prefills[key]

    def _decode(self, sequences: int) -> Work:
        if sequences not in self._decodes:
            self._decodes[sequences] = self._work.decode(sequences)
        return self._decodes[sequences]

    def _dearest(self, seconds: Seconds, price: float) -> FloatArray:
        """[kind, way]: what a device costs by the dearest group that it may be in."""
        rate = seconds.rate(price)
        return seconds.speed * np.stack([rate[held].max(axis=0) for held in self._held.T])

    def _prices(self, seconds: Seconds) -> FloatArray:
        """[price, way]: between them the best changes from one group's reciprocal time to the next."""
        ascending = np.sort(seconds.passing.mean(axis=0), axis=0)
        chosen = np.unique(np.linspace(0, len(ascending) - 1, NUM_PRICES).round().astype(int))
        return np.concatenate([np.zeros((1, ascending.shape[1])), 1 / ascending[chosen]])
