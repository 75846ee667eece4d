"""How long work takes."""

from collections.abc import Callable
from statistics import median
from time import perf_counter


def best_s(work: Callable[[], object], measure_s: float) -> float:
    """The shortest of the runs that fit in `measure_s`, after one to warm up: when nothing disturbs it."""
    return min(_runs_s(work, measure_s))


def median_s(work: Callable[[], object], measure_s: float) -> float:
    """The median of such runs: what memory gives moves, and its best is not what lasts."""
    return median(_runs_s(work, measure_s))


def _runs_s(work: Callable[[], object], measure_s: float) -> list[float]:
    work()
    times: list[float] = []
    while sum(times) < measure_s:
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return times
