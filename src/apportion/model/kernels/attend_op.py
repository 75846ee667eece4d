"""Decode attention (`decode`) as an operation of a table.

Shapes: see there.
"""

from functools import cache
from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from apportion.model.kernels.decode import attend_pairs
from apportion.model.kernels.op_code import FP32_BYTES, Op, floats, op, pointer, row_type, share
from apportion.model.kernels.step_operand import STEP

_ATTEND = row_type(
    *("step", "keys", "values", "beyond", "slots", "kv_heads", "group", "head_dim", "window_tokens"),
    floats=("scale", "softcap"),
)
NO_WINDOW = 2**62


@cache
def attend_op(elements: "np.dtype[Any]") -> Op:
    """Writes the new keys and values, which stand behind the queries (x), to the pool; out = attention. Of the step's
    sequences with one new token.

    `elements` is the type of the pool's arrays (`kv_elements`)."""

    @op(_ATTEND, elements.name)
    def attend(row, number, size):
        a = carray(pointer(row), 1, _ATTEND)[0]
        decode = carray(pointer(a.step), 1, STEP)[0]
        kv_heads, group, head_dim = a.kv_heads, a.group, a.head_dim
        first, stop = share(decode.num * kv_heads, number, size)
        keys_at = FP32_BYTES * a.rows * kv_heads * group * head_dim
        values_at = keys_at + FP32_BYTES * a.rows * kv_heads * head_dim
        attend_pairs(
            floats(a.x, (a.rows, kv_heads, group, head_dim)),
            floats(a.x + keys_at, (a.rows, kv_heads, head_dim)),
            floats(a.x + values_at, (a.rows, kv_heads, head_dim)),
            carray(pointer(decode.rows), decode.num, np.int64),
            carray(pointer(decode.slots), decode.num, np.int64),
            carray(pointer(decode.runs), (decode.num_runs, 2), np.int64),
            carray(pointer(decode.first_run), decode.num + 1, np.int64),
            carray(pointer(a.keys), (kv_heads, a.slots, head_dim), elements),
            carray(pointer(a.values), (kv_heads, a.slots, head_dim), elements),
            carray(pointer(a.beyond), 1, np.int64),
            a.window_tokens,
            np.float32(a.scale),
            np.float32(a.softcap),
            floats(a.x, (kv_heads, group, 0)),
            floats(a.out, (a.rows, kv_heads, group, head_dim)),
            first,
            stop,
        )

    return attend
