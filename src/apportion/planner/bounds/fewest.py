"""Why fewer devices would not do: no search, but bounds on every division of at most so many devices.

Where a rate of arrivals is asked for, any number of sequences may run.
"""

from dataclasses import replace
from math import inf

from apportion.cost.service import ROUNDING, slowest_s
from apportion.planner.bounds.exclusion import Exclusion
from apportion.planner.bounds.ways import all_ways
from apportion.planner.infeasible.error import least_bytes
from apportion.planner.problem import Problem, chunk_candidates, with_sequences
from apportion.types.plan import FewestDevices
from apportion.types.units import format_bytes


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
        self.at_any = Exclusion(replace(problem, any_coordinator=True))
        self.exclusions = [Exclusion(one) for one in problem.with_each_coordinator()]
        rate = self.workload.arrival_rate
        self.seconds = inf if rate is None else slowest_s(self.workload, rate) * ROUNDING

    def excluded(self, most_devices: int) -> str | None:
        """How it is proven that no more than so many devices would not do; None where it is not."""
        chunks, usable = self._chunks(), self._most_bytes(most_devices)
        least = self.workload.concurrency if self.seconds == inf else 1
        needed = least_bytes(with_sequences(self.problem, chunks[-1], least))
        if needed > usable and not self.problem.streaming:
            return (
                f"weights and KV cache take {format_bytes(needed)}, the {most_devices} with the most memory have"
                f" {format_bytes(usable)}"
            )
        ways = all_ways(
            chunks, (least, self._most_sequences(least, usable)), len(self.problem.cluster.devices)
        )
        excluded = self.at_any.excludes(ways, self.seconds, most_devices) or all(
            one.excludes(ways, self.seconds, most_devices) for one in self.exclusions
        )
        if not excluded:
            return None
        asked = ["memory"] + ["rate"] * (self.seconds < inf) + ["limits"] * self.workload.limited
        return f"any {most_devices} in the cheapest groups and order break {' or '.join(asked)} (Lagrangian relaxation)"

    def _most_bytes(self, most_devices: int) -> int:
        return sum(sorted(device.usable_bytes for device in self.problem.cluster.devices)[-most_devices:])

    def _chunks(self) -> tuple[int, ...]:
        """The smallest alone where nothing depends on it but memory."""
        chunks = chunk_candidates(self.workload.max_context_tokens)
        return chunks if self.seconds < inf or self.workload.ttft_limit_s is not None else chunks[-1:]

    def _most_sequences(self, least: int, usable_bytes: int) -> int:
        """As many as there is memory for, where their number is open; at most twice that."""
        if self.seconds == inf:
            return least
        most = least
        while least_bytes(with_sequences(self.problem, self._chunks()[-1], most + 1)) <= usable_bytes:
            most = 2 * most + 1
        return most
