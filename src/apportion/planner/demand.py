"""How many sequences run at once, and on how many devices, where the workload leaves that open."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from math import inf
from typing import Protocol

from apportion.cost.service import served_per_s
from apportion.planner.found import Found
from apportion.planner.problem import sequence_numbers
from apportion.types.errors import InfeasibleError
from apportion.types.workload import Workload

MAX_SEQUENCES = 4096
CLOSE = 1 - 1e-3
"""Relative: numbers between those sampled that gain less are not looked for."""
SATURATED = 1.001
"""Twice the sequences that serve less than this much more show that the devices can do no more."""


class Finder(Protocol):
    """Divisions for given numbers of sequences, on at most so many devices."""

    @property
    def num_devices(self) -> int: ...

    def best(self, workload: Workload, max_devices: int | None, cutoff: float) -> Found | None:
        """Where it is below `cutoff`."""
        ...

    def hopeless(
        self, workload: Workload, sequences: tuple[int, int], max_devices: int | None, cutoff: float
    ) -> bool:
        """Whether none of these numbers, both included, has a division below `cutoff`."""
        ...


def find_demanded(workload: Workload, finder: Finder) -> Found | None:
    """None where nothing fits or keeps the limits. Raises InfeasibleError for an arrival rate that is too high."""
    if workload.objective != "fewest-devices":
        return _serving(workload, None, finder)
    unserved: InfeasibleError | None = None
    for most_devices in range(1, finder.num_devices + 1):
        try:
            found = _serving(workload, most_devices, finder)
        except InfeasibleError as error:
            unserved = error
            continue
        if found is not None:
            return found
    if unserved is not None:
        raise unserved
    return None


def _serving(workload: Workload, most_devices: int | None, finder: Finder) -> Found | None:
    def with_sequences(number: int) -> Found | None:
        return finder.best(replace(workload, concurrency=number), most_devices, inf)

    if workload.arrival_rate is not None:
        return _at_rate(workload.arrival_rate, with_sequences)
    if not workload.limited or workload.objective != "throughput":
        return finder.best(workload, most_devices, inf)
    most = workload.most_sequences or workload.concurrency
    return _best_number(replace(workload, most_sequences=most), most, most_devices, finder)


def _best_number(workload: Workload, most: int, most_devices: int | None, finder: Finder) -> Found | None:
    """Of 1 to `most` sequences; those between the sampled ones are tried where no bound excludes them."""
    best = finder.best(replace(workload, concurrency=1), most_devices, inf)
    if best is None:  # more sequences take more memory, and no less time
        return None
    samples = sequence_numbers(most)
    left = [(before + 1, after - 1) for before, after in pairwise(samples) if before + 1 < after]
    left += [(number, number) for number in samples[1:]]
    while left:
        low, high = left.pop()
        close = 1.0 if low == high else CLOSE
        if finder.hopeless(workload, (low, high), most_devices, best.value * close):
            continue
        middle = (low + high) // 2
        found = finder.best(replace(workload, concurrency=middle), most_devices, best.value)
        if found is not None and found.value < best.value:
            best = found
        left += [part for part in ((low, middle - 1), (middle + 1, high)) if part[0] <= part[1]]
    return best


def _at_rate(rate: float, find: Callable[[int], Found | None]) -> Found | None:
    """The fewest sequences in flight that serve so many requests a second: by doubling, then by halving the gap."""
    tried: dict[int, Found] = {}
    short = 0
    enough: int | None = None
    for number in _doubling(find, tried):
        if _served(tried[number]) >= rate:
            enough = number
            break
        short = number
    if enough is None:
        if not tried:
            return None
        best = max(tried.values(), key=_served)
        raise InfeasibleError(
            f"{rate:g} requests/s cannot be served: the highest rate found is {_served(best):.3g}/s, with "
            f"{best.problem.workload.concurrency} in flight; give a lower --arrival-rate, or more devices"
        )
    while enough - short > 1:
        middle = (short + enough) // 2
        found = find(middle)
        if found is not None and _served(found) >= rate:
            tried[middle], enough = found, middle
        else:
            short = middle
    return tried[enough]


def _doubling(find: Callable[[int], Found | None], tried: dict[int, Found]) -> Iterator[int]:
    """1, 2, 4, … while there is a plan that serves more, then the most sequences for which there is one."""
    number, before = 1, 0.0
    while number <= MAX_SEQUENCES:
        found = find(number)
        if found is None:
            break
        tried[number] = found
        yield number
        if _served(found) < before * SATURATED:
            return
        before, number = _served(found), 2 * number
    low, high = number // 2, number
    while high - low > 1 and low:
        middle = (low + high) // 2
        found = find(middle)
        if found is None:
            high = middle
        else:
            tried[middle], low = found, middle
    if low and low not in (number // 2,):
        yield low


def _served(found: Found) -> float:
    return served_per_s(found.problem.workload, found.value)
