"""How many sequences run at once, and on how many devices, where the workload leaves that open.

`find(workload, most_devices)` gives the best division for a given number of sequences.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from apportion.cost.service import served_per_s
from apportion.planner.found import Found
from apportion.planner.problem import sequence_numbers
from apportion.types.errors import InfeasibleError
from apportion.types.workload import Workload

Find = Callable[[Workload, int | None], Found | None]
MAX_SEQUENCES = 4096
SATURATED = 1.001
"""Twice the sequences that serve less than this much more show that the devices can do no more."""


def find_demanded(workload: Workload, num_devices: int, find: Find) -> Found | None:
    """None where nothing fits or keeps the limits. Raises InfeasibleError for an arrival rate that is too high."""
    if workload.objective != "fewest-devices":
        return _serving(workload, None, find)
    unserved: InfeasibleError | None = None
    for most_devices in range(1, num_devices + 1):
        try:
            found = _serving(workload, most_devices, find)
        except InfeasibleError as error:
            unserved = error
            continue
        if found is not None:
            return found
    if unserved is not None:
        raise unserved
    return None


def _serving(workload: Workload, most_devices: int | None, find: Find) -> Found | None:
    def with_sequences(number: int) -> Found | None:
        return find(replace(workload, concurrency=number), most_devices)

    if workload.arrival_rate is not None:
        return _at_rate(workload.arrival_rate, with_sequences)
    if not workload.limited or workload.objective != "throughput":
        return find(workload, most_devices)
    most = workload.most_sequences or workload.concurrency
    workload = replace(workload, most_sequences=most)
    found = [one for number in sequence_numbers(most) if (one := with_sequences(number))]
    return min(found, key=lambda one: one.value, default=None)


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
