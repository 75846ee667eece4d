"""A row of scores on its way through an online softmax: C of them, filled up to whole lanes, first as products of query
and key, then in units of ln 2, in the end weights against the highest of all so far."""

import numpy as np
from numba import njit

from apportion.model.kernels.exponential import LOG2_E, tanh, weight_of
from apportion.model.kernels.lanes import (
    NUM_LANES,
    all_lanes,
    higher,
    highest_of,
    load,
    minus,
    plus,
    store,
    sum_of,
    times,
    zeros,
)


@njit(inline="always")
def scale(row_C, factor):
    for c in range(0, len(row_C), NUM_LANES):
        store(times(load(row_C, c), factor), row_C, c)


@njit(inline="always")
def cap(row_C, factor, softcap):
    """softcap · tanh(factor · score), in units of ln 2"""
    for c in range(0, len(row_C), NUM_LANES):
        store(times(tanh(times(load(row_C, c), factor)), softcap * LOG2_E), row_C, c)


@njit(inline="always")
def hide(row_C, first, stop):
    """All but `[first, stop)`."""
    for c in range(first):
        row_C[c] = -np.inf
    for c in range(stop, len(row_C)):
        row_C[c] = -np.inf


@njit(inline="always")
def highest(row_C, before):
    tops = all_lanes(before)
    for c in range(0, len(row_C), NUM_LANES):
        tops = higher(load(row_C, c), tops)
    return highest_of(tops)


@njit(inline="always")
def weigh(row_C, top):
    """Replaces the scores by their weights; returns the sum."""
    total = zeros()
    for c in range(0, len(row_C), NUM_LANES):
        weights = weight_of(minus(load(row_C, c), top))
        store(weights, row_C, c)
        total = plus(total, weights)
    return sum_of(total)
