"""The best division for a number of sequences, over prefill chunks and numbers of microbatches.

With limits only those ways to serve the workload are searched for which no bound excludes them (bounds/exclusion.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from math import inf

from apportion.cost.estimate import objective_value
from apportion.cost.service import holds_requests
from apportion.cost.traffic import joins_all
from apportion.planner.bounds.bound import none_below, rough_bound
from apportion.planner.bounds.exclusion import Exclusion
from apportion.planner.bounds.ways import all_ways
from apportion.planner.divide import search
from apportion.planner.found import Found
from apportion.planner.problem import (
    Problem,
    chunk_candidates,
    chunk_choices,
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
        choices = chunk_choices(workload, self.num_devices)
        found = self._best_of(choices, workload, max_devices, cutoff)
        if found is not None:
            return found if len(choices) > 1 else self._with_better_chunk(found, max_devices)
        others = [chunk for chunk in chunk_candidates(workload.max_context_tokens) if chunk not in choices]
        # Memory falls with the chunk: what the smallest does not allow, none does.
        if not others or self._best_of(others[-1:], workload, max_devices, cutoff) is None:
            return None
        each = (self._best_of((chunk,), workload, max_devices, cutoff) for chunk in others)
        return next((one for one in each if one is not None), None)

    def _with_better_chunk(self, found: Found, max_devices: int | None) -> Found:
        """Where one chunk was searched: that which is best for the division found is searched too."""
        workload, own = found.problem.workload, found.problem.capacity.chunk_tokens
        # Memory falls with the chunk, so the division fits with every smaller one.
        smaller = [chunk for chunk in useful_chunks(workload) if chunk < own]
        best = min((own, *smaller), key=lambda chunk: self._value(found, chunk))
        if best == own:
            return found
        other = self._best_of((best,), workload, max_devices, found.value)
        return other if other is not None and other.value < found.value else found

    def _value(self, found: Found, chunk_tokens: int) -> float:
        return objective_value(
            self.model,
            found.problem.cluster,
            found.problem.workload,
            found.stages,
            chunk_tokens=chunk_tokens,
            microbatches=found.microbatches,
        )

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
    microbatches: those ways that may be good first, and none that a bound excludes."""
    kinds = kinds_of(problems[0].model)
    at_any = [replace(problem, any_coordinator=True) for problem in problems]
    ways = [
        (rough_bound(problem, number, kinds), place, number)
        for place, problem in enumerate(at_any)
        for number in microbatch_candidates(problem.workload, len(problem.cluster.devices))
    ]
    best: Found | None = None
    for bound, place, number in sorted(ways):
        if bound >= cutoff * BETTER or _is_hopeless(at_any[place], number, cutoff, kinds):
            continue
        each = _with_coordinators(problems[place])
        for problem in each:
            if len(each) > 1 and _is_hopeless(problem, number, cutoff, kinds):
                continue
            found = search(problem, (number,), cutoff, kinds)
            if found is not None and found.value < cutoff:
                best = _with_best_coordinator(found)
                cutoff = best.value
    return best


def _is_hopeless(problem: Problem, microbatches: int, cutoff: float, kinds: StageKinds) -> bool:
    return cutoff < inf and none_below(problem, microbatches, cutoff * BETTER, kinds)


def _with_coordinators(problem: Problem) -> tuple[Problem, ...]:
    """That are searched: with too many ways to use the devices one alone, and the best host for what is found."""
    each = problem.with_each_coordinator()
    return each if is_exact(problem, possible_groups(problem)) else each[:1]


def _with_best_coordinator(found: Found) -> Found:
    """For the same stages."""
    best = found
    for problem in found.problem.with_each_coordinator():
        if joins_all(problem.cluster, found.stages):
            value = problem.value(found.stages, found.microbatches)
            if value < best.value * BETTER:
                best = replace(found, problem=problem, value=value)
    return best
