"""The best division for a number of sequences, over prefill chunks and numbers of microbatches.

With limits only those ways to serve the workload are searched for which no bound excludes them (bounds/exclusion.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import chain
from math import inf

from apportion.cost.service import holds_requests
from apportion.cost.traffic import joins_all
from apportion.planner.bounds.bound import Numbers, all_numbers, halves, none_below, rough_bound
from apportion.planner.bounds.exclusion import Exclusion
from apportion.planner.bounds.ways import all_ways
from apportion.planner.divide import search
from apportion.planner.found import Found
from apportion.planner.problem import (
    Problem,
    chunk_candidates,
    make_problem,
    microbatch_candidates,
    useful_chunks,
)
from apportion.planner.search.division import is_exact
from apportion.planner.stages.groups import possible_groups
from apportion.planner.stages.kinds import StageKinds, kinds_of
from apportion.types.cluster import Cluster
from apportion.types.constraints import UNCONSTRAINED, Constraints
from apportion.types.model import ModelSpec
from apportion.types.workload import Workload

BETTER = 1 - 1e-9
"""Relative: less of a gain is rounding."""
MOST_WAYS = 4
"""Of serving, that are searched where there are too many ways to use the devices; the certificate is for all."""


class Finder:
    def __init__(
        self,
        model: ModelSpec,
        cluster: Cluster,
        weight_formats: tuple[str, ...],
        constraints: Constraints = UNCONSTRAINED,
        *,
        streaming: bool,
    ) -> None:
        self.model, self.cluster = model, cluster
        self.weight_formats, self.streaming = weight_formats, streaming
        self.constraints = constraints
        self.num_devices = len(cluster.devices)

    def best(self, workload: Workload, max_devices: int | None = None, cutoff: float = inf) -> Found | None:
        """Where it is below `cutoff`."""
        return self._best_of(useful_chunks(workload), workload, max_devices, cutoff)

    def hopeless(
        self, workload: Workload, sequences: tuple[int, int], max_devices: int | None, cutoff: float
    ) -> bool:
        """Whether it is proven that with none of these numbers of sequences a division is below `cutoff`."""
        chunks = chunk_candidates(workload.max_context_tokens)
        fewest = replace(workload, concurrency=sequences[0])
        if not holds_requests(fewest):
            return True
        ways = all_ways(chunks, sequences, self.num_devices)
        problem = replace(self._problem(fewest, chunks[0], max_devices), any_coordinator=True)
        return Exclusion(problem).excludes(ways, cutoff * BETTER, max_devices)

    def _best_of(
        self, chunks: Sequence[int], workload: Workload, max_devices: int | None, cutoff: float
    ) -> Found | None:
        if not holds_requests(workload):
            return None
        problems = [self._problem(workload, chunk, max_devices) for chunk in chunks]
        if not workload.limited:
            return _search_all(problems, cutoff)
        best: Found | None = None
        for problem in chain.from_iterable(problem.with_each_coordinator() for problem in problems):
            numbers = self._hopeful(problem, cutoff)
            found = search(problem, numbers, cutoff) if numbers else None
            if found is not None and (best is None or found.value < best.value):
                best, cutoff = found, min(cutoff, found.value)
        return best

    def _hopeful(self, problem: Problem, cutoff: float) -> list[int]:
        """The numbers of microbatches for which a division may keep the limits and be below `cutoff`."""
        exclusion, number = Exclusion(problem), problem.workload.concurrency
        ways = all_ways((problem.capacity.chunk_tokens,), (number, number), self.num_devices)
        hopeful = list(exclusion.hopeful(ways, cutoff * BETTER, problem.max_devices))
        return [
            number
            for number in microbatch_candidates(problem.workload, self.num_devices)
            if any(way.microbatches[0] <= number <= way.microbatches[1] for way in hopeful)
        ]

    def _problem(self, workload: Workload, chunk_tokens: int, max_devices: int | None) -> Problem:
        problem = make_problem(
            self.model, self.cluster, workload, self.weight_formats, chunk_tokens, self.constraints
        )
        return replace(problem, max_devices=max_devices, streaming=self.streaming)


def _search_all(problems: Sequence[Problem], cutoff: float) -> Found | None:
    """The best of problems that differ in their prefill chunk, with the coordinator on any host and in any number of
    microbatches: those ways that may be good first, and none that a bound excludes. Where not all divisions are
    searched, the first few, and the coordinator where it is best for what is found."""
    kinds = kinds_of(problems[0].model)
    at_any = [replace(problem, any_coordinator=True) for problem in problems]
    exact = is_exact(problems[0], possible_groups(problems[0]))
    ways = [
        (rough_bound(problem, numbers, kinds), place, numbers)
        for place, problem in enumerate(at_any)
        for numbers in all_numbers(problem)
    ]
    heapify(ways)
    best: Found | None = None
    tried = 0
    while ways and (best is None or exact or tried < MOST_WAYS):
        bound, place, numbers = heappop(ways)
        if bound >= cutoff * BETTER:
            break
        if numbers[0] < numbers[1]:
            for part in halves(numbers):
                heappush(ways, (rough_bound(at_any[place], part, kinds), place, part))
            continue
        if exact and _is_hopeless(at_any[place], numbers, cutoff, kinds):
            continue
        tried += 1
        found = _search_coordinators(problems[place], numbers, cutoff, kinds, exact=exact)
        if found is not None:
            best, cutoff = found, found.value
    return best


def _search_coordinators(
    problem: Problem, microbatches: Numbers, cutoff: float, kinds: StageKinds, *, exact: bool
) -> Found | None:
    """The best below `cutoff` for one number of microbatches, with the coordinator on any host."""
    best: Found | None = None
    each = problem.with_each_coordinator()
    for one in each if exact else each[:1]:
        if exact and len(each) > 1 and _is_hopeless(one, microbatches, cutoff, kinds):
            continue
        found = search(one, microbatches[:1], cutoff, kinds)
        if found is not None and found.value < cutoff:
            best = _with_best_coordinator(found)
            cutoff = best.value
    return best


def _is_hopeless(problem: Problem, microbatches: Numbers, cutoff: float, kinds: StageKinds) -> bool:
    return cutoff < inf and none_below(problem, microbatches, cutoff * BETTER, kinds)


def _with_best_coordinator(found: Found) -> Found:
    """For the same stages."""
    best = found
    for problem in found.problem.with_each_coordinator():
        if joins_all(problem.cluster, found.stages):
            value = problem.value(found.stages, found.microbatches)
            if value < best.value * BETTER:
                best = replace(found, problem=problem, value=value)
    return best
