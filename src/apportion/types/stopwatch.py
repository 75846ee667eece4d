"""How long work takes when nothing disturbs it."""

from collections.abc import Callable
from time import perf_counter


def best_s(work: Callable[[], object], measure_s: float) -> float:
    """The shortest of the runs that fit in `measure_s`, after one to warm up."""
    work()
    times: list[float] = []
    while sum(times) < measure_s:
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times)
