# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
# scipy has no type stubs.
"""The least cost of real-valued shares that have to do for several phases at once, as a linear program."""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def shared_level(rates: FloatArray, weights: FloatArray, total: int) -> float:
    """The least Σ_q weights_q · max_g units_g · rates_qg over real-valued units."""
    num_phases, size = rates.shape
    shapes = rates / rates.max(axis=1, keepdims=True)
    if np.ptp(shapes, axis=0).max() < 1e-9 or weights.max() == 0:
        return 0.0  # all phases are fastest with the same shares: apart they cost as much
    if num_phases == 2:
        return _of_two(rates, weights, total)
    from scipy.optimize import linprog  # takes longer to import than most plans to make

    scale = rates.max() * total
    above = np.zeros((num_phases * size, size + num_phases))
    for phase in range(num_phases):
        rows = slice(phase * size, (phase + 1) * size)
        above[rows, :size] = np.diag(rates[phase] * total / scale)
        above[rows, size + phase] = -1.0
    result = cast(
        Any,
        linprog(
            np.concatenate([np.zeros(size), weights / weights.max()]),
            A_ub=above,
            b_ub=np.zeros(len(above)),
            A_eq=np.array([[1.0] * size + [0.0] * num_phases]),
            b_eq=np.ones(1),
        ),
    )
    return float(result.fun) * (1 - 1e-6) * scale * float(weights.max()) if result.status == 0 else 0.0


def _of_two(rates: FloatArray, weights: FloatArray, total: int) -> float:
    """With levels t and ρ·t of both phases member g has room for min(t/rates_0g, ρ·t/rates_1g) units. For a given ρ
    the least t follows; between the ρ at which members' two rooms are alike the cost is monotonic."""
    ratios = rates[1] / rates[0]
    room = np.minimum(1 / rates[0], ratios[:, None] / rates[1]).sum(axis=1)
    return float(((weights[0] + weights[1] * ratios) / room).min()) * total * (1 - 1e-9)
