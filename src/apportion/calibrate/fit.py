"""Constants of a device from observations: the likeliest, given what was assumed before and how far that is trusted.

In logarithms: residuals log(predicted / measured) in units of their noise, and each constant's distance from the
assumed one in units of its trust. What the data do not tell apart (bytes and layers grow together in one model) stays
in the assumed proportion. Decode gives bytes/s and the overheads, prefill and large batches flop/s; `soft_l1` bounds
the pull of a run that was disturbed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import copysign, exp, hypot, log, sqrt
from statistics import median
from typing import Any

import numpy as np

from apportion.calibrate.observation import Observation, Phase
from apportion.calibrate.quiet import without_outliers
from apportion.cost.roofline import overlapped_s
from apportion.types.cluster import ASSUMED_SPREAD

TRUST = {
    "mem_bytes_per_s": 0.25,
    "host_bytes_per_s": 0.25,
    "flops_per_s": 0.4,
    "layer_overhead_s": 0.7,
    "step_overhead_s": 0.7,
}
"""Standard deviations of the assumed constants, as logarithms: rates are measured or stated, overheads are guessed."""
NOISE: dict[Phase, float] = {"decode": 0.04, "prefill": 0.12}
"""Of one run's mean step. A prefill is a single step, the first with its shape, so it scatters more."""
BOUND = 2.0
"""Residuals beyond so many standard deviations count linearly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Of a device at full speed. `host_bytes_per_s` is what its host's memory gives to all; None for its own memory."""

    mem_bytes_per_s: float
    host_bytes_per_s: float | None
    flops_per_s: float
    layer_overhead_s: float
    step_overhead_s: float

    def seconds(self, seen: Observation) -> float:
        """The cost model's time of that step."""
        reading = self.mem_bytes_per_s
        if self.host_bytes_per_s is not None:
            reading /= seen.beside.slowdown(reading, self.host_bytes_per_s)
        return (
            sum(overlapped_s(flops / self.flops_per_s, size / reading) for flops, size in seen.work)
            + seen.num_layers * self.layer_overhead_s
            + self.step_overhead_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """`*_spread` is the relative standard deviation to expect of a prediction; one run alone says little of it."""

    constants: Constants
    runs: frozenset[str]
    """That were learned from."""
    decode_spread: float
    prefill_spread: float


def fit_device(assumed: Constants, seen: Sequence[Observation]) -> Fit:
    """`seen` are one device's observations in one weight format."""
    seen = without_outliers(seen, assumed.seconds)
    decode = [one for one in seen if one.phase == "decode"]
    prefill = [one for one in seen if one.phase == "prefill"]
    constants = _likeliest(assumed, [*decode, *prefill])
    return Fit(
        constants=constants,
        runs=frozenset(one.run for one in seen),
        decode_spread=_spread(constants, decode),
        prefill_spread=_spread(constants, prefill),
    )


def fit_latency_s(assumed_s: float, bytes_per_s: float, seen: Sequence[Observation]) -> float:
    """Of a link: the median of what reductions take beyond their bytes. Never below zero."""
    beyond_s = [one.measured_s - sum(size for _, size in one.work) / bytes_per_s for one in seen]
    return max(0.0, _median_or(beyond_s, assumed_s))


def fit_hop_s(assumed_s: float, latency_s: float, seen: Sequence[Observation]) -> float:
    """Of a link: the median of what messages between stages take beyond the latency. Never below zero."""
    beyond_s = [one.waiting_s - latency_s for one in seen if one.waiting_s is not None]
    return max(0.0, _median_or(beyond_s, assumed_s))


def _likeliest(assumed: Constants, seen: Sequence[Observation]) -> Constants:
    fitted = [(name, sigma) for name, sigma in TRUST.items() if getattr(assumed, name)]
    if not seen or not fitted:
        return assumed

    def scaled(logs: Any) -> Constants:
        factors = {name: getattr(assumed, name) * exp(x) for (name, _), x in zip(fitted, logs, strict=True)}
        return replace(assumed, **factors)

    return scaled(_minimum(lambda logs: _residuals(scaled(logs), seen), [s for _, s in fitted]))


def _minimum(residuals: Callable[[Any], list[float]], trust: Sequence[float]) -> Any:
    from scipy.optimize import (
        least_squares,  # half a second that a cluster without measurements does not spend
    )

    def terms(logs: Any) -> Any:
        distances = [x / sigma for x, sigma in zip(logs, trust, strict=True)]
        return np.array([*map(_bounded, residuals(logs)), *distances])

    return least_squares(terms, np.zeros(len(trust)), bounds=(-4, 4)).x


def _bounded(residual: float) -> float:
    """Its square is the soft_l1 loss: r² near zero, linear in r beyond `BOUND`."""
    return copysign(BOUND * sqrt(2 * (hypot(1, residual / BOUND) - 1)), residual)


def _residuals(constants: Constants, seen: Sequence[Observation]) -> list[float]:
    return [log(constants.seconds(one) / one.measured_s) / NOISE[one.phase] for one in seen]


def _spread(constants: Constants, seen: Sequence[Observation]) -> float:
    """Residuals, with the spread of uncalibrated predictions as one more observation."""
    squares = [log(constants.seconds(one) / one.measured_s) ** 2 for one in seen]
    return sqrt((ASSUMED_SPREAD.decode**2 + sum(squares)) / (1 + len(squares)))


def _median_or(values: Sequence[float], otherwise: float) -> float:
    return median(values) if values else otherwise
