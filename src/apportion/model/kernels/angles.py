"""Cosine and sine for compiled code: those of the machine's own library differ in their last bits between libraries."""

import math

import numpy as np
from numba import njit

from apportion.model.kernels.lanes import fma, rint

_QUARTER = math.pi / 2
_QUARTER_REST = 6.123233995736766e-17
"""π/2 less what fp64 holds of it."""
_QUARTERS = 2 / math.pi


@njit(inline="always")
def cos_sin(angle):
    """Of an fp32 angle, computed in fp64: Taylor's polynomials of what is left of whole quarters of a turn, rounded to
    the nearest fp32 number but for a few in a million."""
    quarters = rint(angle * _QUARTERS)
    r = fma(quarters, -_QUARTER_REST, fma(quarters, -_QUARTER, np.float64(angle)))
    s = r * r
    sin = fma(s, fma(s, -1 / 39916800, 1 / 362880), -1 / 5040)
    sin = fma(r * s, fma(s, fma(s, sin, 1 / 120), -1 / 6), r)
    cos = fma(s, fma(s, 1 / 479001600, -1 / 3628800), 1 / 40320)
    cos = fma(s, fma(s, fma(s, fma(s, cos, -1 / 720), 1 / 24), -1 / 2), 1.0)
    odd, number = np.int64(quarters) & 1, np.int64(quarters)
    cosine, sine = (sin, cos) if odd else (cos, sin)
    cosine = -cosine if (number + 1) & 2 else cosine
    return np.float32(cosine), np.float32(-sine if number & 2 else sine)
