"""Integer shares of one axis: minimise Σ_q max_g units_g · rate_{q,g}, with caps on the units of each member.

One direction q (rates proportional among all phases) is water-filling: raise a common level until the units
held below it reach the total. Several are solved one limit at a time (stages/threshold.py), the last by water-filling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from apportion.planner.stages.threshold import minimise

Rates = tuple[float, ...]
"""Weighted seconds per unit, by member."""


@dataclass(frozen=True, slots=True)
class Filling:
    units: tuple[int, ...]
    total: float
    """Σ over all directions but the first."""
    maximum: float
    """Of the first direction."""

    @property
    def value(self) -> float:
        return self.total + self.maximum


def merge_parallel(rates: Sequence[Rates]) -> tuple[Rates, ...]:
    """Directions that are multiples of each other have their maximum at the same member: they add up."""
    merged: dict[tuple[float, ...], Rates] = {}
    for direction in rates:
        largest = max(direction)
        if largest == 0:
            continue
        key = tuple(round(rate / largest, 12) for rate in direction)
        merged[key] = tuple(map(sum, zip(merged.get(key, (0.0,) * len(direction)), direction, strict=True)))
    return tuple(merged.values())


def fill(rates: Sequence[Rates], caps: Sequence[int], total_units: int) -> Filling | None:
    """The best shares with `1 ≤ units_g ≤ caps_g`; None where the caps do not reach the total."""
    if min(caps) < 1 or sum(caps) < total_units or len(caps) > total_units:
        return None
    if not rates:
        rates = [(0.0,) * len(caps)]
    first, *others = rates
    if not others:
        units = water_fill(first, caps, total_units)
        return Filling(units, 0.0, highest(first, units))

    def solve(limit: float) -> Filling | None:
        limited = _limited(caps, first, limit)
        inner = fill(others, limited, total_units)
        if inner is None:
            return None
        return Filling(inner.units, inner.value, highest(first, inner.units))

    lowest = highest(first, water_fill(first, caps, total_units))
    return minimise(solve, lambda total, maximum: total + maximum, lowest * (1 - 1e-9))


def highest(rates: Rates, units: Sequence[int]) -> float:
    return max(rate * held for rate, held in zip(rates, units, strict=True))


def _limited(caps: Sequence[int], rates: Rates, limit: float) -> list[int]:
    if limit == inf:
        return list(caps)
    return [
        min(cap, int(limit / rate * (1 + 1e-13))) if rate > 0 else cap
        for cap, rate in zip(caps, rates, strict=True)
    ]


def water_fill(rates: Rates, caps: Sequence[int], total_units: int) -> tuple[int, ...]:
    """Minimises max_g units_g · rate_g: from the real-valued level downwards rounded, then unit by unit."""
    level = _real_level(rates, caps, total_units)
    units = [
        max(1, min(cap, int(level / rate))) if rate > 0 else cap
        for cap, rate in zip(caps, rates, strict=True)
    ]
    missing = total_units - sum(units)
    while missing > 0:
        rank = min(
            (rank for rank, cap in enumerate(caps) if units[rank] < cap),
            key=lambda rank: (units[rank] + 1) * rates[rank],
        )
        units[rank] += 1
        missing -= 1
    while missing < 0:
        rank = max(
            (rank for rank, held in enumerate(units) if held > 1),
            key=lambda rank: (units[rank] * rates[rank], units[rank]),
        )
        taken = min(-missing, units[rank] - 1) if rates[rank] == 0 else 1
        units[rank] -= taken
        missing += taken
    return tuple(units)


def _real_level(rates: Rates, caps: Sequence[int], total_units: int) -> float:
    """The level at which real-valued shares below the caps reach the total."""
    open_ranks = {rank for rank, rate in enumerate(rates) if rate > 0}
    remaining = total_units - sum(cap for cap, rate in zip(caps, rates, strict=True) if rate == 0)
    while open_ranks:
        level = max(0, remaining) / sum(1 / rates[rank] for rank in open_ranks)
        full = {rank for rank in open_ranks if caps[rank] * rates[rank] < level}
        if not full:
            return level * (1 - 1e-12)
        open_ranks -= full
        remaining -= sum(caps[rank] for rank in full)
    return max(cap * rate for cap, rate in zip(caps, rates, strict=True))
