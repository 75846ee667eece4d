"""The embedding as an operation of a table.

Shapes: T = tokens of the batch, V = the member's vocabulary rows, H = hidden size.
"""

from functools import cache
from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from apportion.model.kernels.kv_elements import widened
from apportion.model.kernels.op_code import Op, floats, op, pointer, row_type, share

_LOOK_UP = row_type("source", "width", "table", "scales", "first_row", "num_rows", floats=("multiplier",))


@cache
def look_up_op(elements: "np.dtype[Any]") -> Op:
    """out = the rows of the ids that lie at the address at `source`, times (their scales · the multiplier); zeros for
    ids that are not `[first_row, first_row + num_rows)`. The scales may be missing (0).

    `elements` is the type of the table: int8, or as in `kv_elements`."""

    @op(_LOOK_UP, elements.name)
    def look_up(row, number, size):
        a = carray(pointer(row), 1, _LOOK_UP)[0]
        ids_T = carray(pointer(carray(pointer(a.source), 1, np.int64)[0]), a.rows, np.int64)
        table_VH = carray(pointer(a.table), (a.num_rows, a.width), elements)
        scales_V, out_TH = floats(a.scales, a.num_rows), floats(a.out, (a.rows, a.width))
        multiplier = np.float32(a.multiplier)
        start, stop = share(a.rows, number, size)
        for t in range(start, stop):
            v = ids_T[t] - a.first_row
            if v < 0 or v >= a.num_rows:
                out_TH[t] = 0
                continue
            factor = scales_V[v] * multiplier if a.scales != 0 else multiplier
            for h in range(a.width):
                out_TH[t, h] = widened(table_VH[v, h]) * factor

    return look_up
