"""Why fewer devices would not do: no search, but bounds on every division of at most so many devices.

Where a rate of arrivals is asked for, any number of sequences may run: intervals of numbers are excluded at once
(limited_bound.py), and halved where that fails.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import inf

from apportion.cost.service import ROUNDING, slowest_s
from apportion.planner.groups import possible_groups
from apportion.planner.infeasible import least_bytes
from apportion.planner.limited_bound import LimitedBound
from apportion.planner.problem import Problem, chunk_candidates, microbatch_candidates, with_sequences
from apportion.planner.stage_kinds import StageKinds
from apportion.types.plan import FewestDevices
from apportion.types.units import format_bytes

MAX_INTERVALS = 100
"""Of numbers of sequences that are looked at before giving up."""
Interval = tuple[int, int]
"""Least and most sequences."""


def prove_fewest(problem: Problem, num_used: int) -> FewestDevices:
    """The smallest number of devices that is not excluded, at most the `num_used` of a plan for `problem`."""
    fewer = _Fewer(replace(problem, max_devices=num_used))
    for most in range(num_used - 1, 0, -1):
        method = fewer.excluded(most)
        if method is not None:
            return FewestDevices(number=most + 1, method=method)
    return FewestDevices(number=1, method="nothing fewer than one" if num_used == 1 else "none are excluded")


class _Fewer:
    def __init__(self, problem: Problem) -> None:
        self.problem, self.workload = problem, problem.workload
        self.groups = possible_groups(problem)
        self.kinds = StageKinds(problem.model)
        rate = self.workload.arrival_rate
        self.seconds = inf if rate is None else slowest_s(self.workload, rate) * ROUNDING
        self._bounds: dict[tuple[int, Interval, int], LimitedBound] = {}

    def excluded(self, most_devices: int) -> str | None:
        """How it is proven that no more than so many devices would not do; None where it is not."""
        needed = least_bytes(self._at(self._chunks()[-1], 1 if self.seconds < inf else None))
        usable = sorted(device.usable_bytes for device in self.problem.cluster.devices)
        largest = sum(usable[-most_devices:])
        if needed > largest and not self.problem.streaming:
            return (
                f"weights and KV cache take {format_bytes(needed)}, the {most_devices} with the most memory have"
                f" {format_bytes(largest)}"
            )
        if all(self._chunk_excluded(chunk, most_devices) for chunk in self._chunks()):
            asked = "memory, rate and limits" if self.workload.limited else "memory and rate"
            asked = asked if self.seconds < inf or self.workload.limited else "memory"
            return (
                f"the cheapest {most_devices} in any groups and order break {asked} (Lagrangian relaxation)"
            )
        return None

    def _chunks(self) -> tuple[int, ...]:
        """The smallest alone where nothing depends on it but memory."""
        chunks = chunk_candidates(self.workload.max_context_tokens)
        return chunks if self.seconds < inf or self.workload.ttft_limit_s is not None else chunks[-1:]

    def _at(self, chunk_tokens: int, sequences: int | None) -> Problem:
        return with_sequences(self.problem, chunk_tokens, sequences or self.workload.concurrency)

    def _chunk_excluded(self, chunk_tokens: int, most_devices: int) -> bool:
        left = self._intervals(chunk_tokens, most_devices)
        for _ in range(MAX_INTERVALS):
            if not left:
                return True
            low, high = left.pop()
            if not self._interval_excluded(chunk_tokens, (low, high), most_devices):
                if low == high:
                    return False
                middle = (low + high) // 2
                left += [(low, middle), (middle + 1, high)]
        return False

    def _intervals(self, chunk_tokens: int, most_devices: int) -> list[Interval]:
        """Where the number is open: 1, 2 to 3, 4 to 7, … up to those for which there is no memory."""
        if self.seconds == inf:
            return [(self.workload.concurrency, self.workload.concurrency)]
        usable = sorted(device.usable_bytes for device in self.problem.cluster.devices)
        low, found = 1, list[Interval]()
        while least_bytes(self._at(chunk_tokens, low)) <= sum(usable[-most_devices:]):
            found.append((low, 2 * low - 1))
            low *= 2
        return found

    def _interval_excluded(self, chunk_tokens: int, interval: Interval, most_devices: int) -> bool:
        return all(
            bound.excluded(self.seconds, most_devices) for bound in self._of_interval(chunk_tokens, interval)
        )

    def _of_interval(self, chunk_tokens: int, interval: Interval) -> Iterator[LimitedBound]:
        problem, num_devices = self._at(chunk_tokens, interval[0]), len(self.problem.cluster.devices)
        numbers = range(1, min(interval[1], 2 * num_devices) + 1)
        if interval[0] == interval[1]:
            numbers = microbatch_candidates(problem.workload, num_devices)
        for microbatches in numbers:
            key = (chunk_tokens, interval, microbatches)
            if key not in self._bounds:
                self._bounds[key] = LimitedBound(problem, microbatches, self.groups, self.kinds, interval[1])
            yield self._bounds[key]
