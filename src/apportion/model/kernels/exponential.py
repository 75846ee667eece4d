"""2^x and tanh for compiled code in fp32, of one number or of 16 lanes: polynomials, every rounding written down."""

import numpy as np
from numba import njit

from apportion.model.kernels.lanes import (
    fma,
    higher,
    lower,
    minus,
    over,
    plus,
    power_of_2,
    rint,
    times,
    where_above,
)

LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_HIGHEST_EXPONENT = np.float32(126)
_F = np.float32


@njit(inline="always")
def _parts(x):
    """k, r and s of 2^x = 2^k · (1 + r·s), with 1 + r·s between 1/√2 and √2, relative error below 2e-7; x is cut off at
    ± `_HIGHEST_EXPONENT`."""
    cut = lower(higher(x, -_HIGHEST_EXPONENT), _HIGHEST_EXPONENT)
    k = rint(cut)
    r = times(minus(cut, k), _LN_2)
    tail = fma(r, fma(r, fma(r, _F(1 / 720), _F(1 / 120)), _F(1 / 24)), _F(1 / 6))
    return k, r, fma(r, fma(r, tail, _F(0.5)), _F(1))


@njit(inline="always")
def exp2(x):
    k, r, s = _parts(x)
    return times(fma(r, s, _F(1)), power_of_2(k))


@njit(inline="always")
def weight_of(x):
    """2^x, and 0 for what is not above 2^-126."""
    return where_above(x, -_HIGHEST_EXPONENT, exp2(x))


@njit(inline="always")
def tanh(x):
    """(e^2x − 1) / (e^2x + 1), exact to the last bits near 0 too."""
    k, r, s = _parts(times(x, _F(2) * LOG2_E))
    power = power_of_2(k)
    less_1 = fma(times(power, r), s, minus(power, _F(1)))
    return over(less_1, plus(less_1, _F(2)))
