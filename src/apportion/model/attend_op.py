"""Decode attention (`decode_kernel`) as an operation of a table.

Shapes: see there.
"""

from functools import cache
from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from apportion.model.batch import DecodeRows
from apportion.model.decode_kernel import attend_decode
from apportion.model.op_code import Op, floats, op, pointer, row_type, share

_ROWS = np.dtype([(name, "i8") for name in ("num", "rows", "slots", "num_runs", "runs", "first_run")])
_ATTEND = row_type(
    *("decode", "keys", "values", "beyond", "slots", "kv_heads", "group", "head_dim", "window_tokens"),
    floats=("scale", "softcap"),
)
NO_WINDOW = 2**62


@cache
def attend_op(elements: "np.dtype[Any]") -> Op:
    """Writes new keys (y) and values (z) to the pool's; out = attention of the queries (x), of the rows in `decode`.

    `elements` is the type of the pool's arrays (`kv_elements`)."""

    @op(_ATTEND)
    def attend(row, number, size):
        a = carray(pointer(row), 1, _ATTEND)[0]
        decode = carray(pointer(a.decode), 1, _ROWS)[0]
        kv_heads, group, head_dim = a.kv_heads, a.group, a.head_dim
        first, stop = share(decode.num * kv_heads, number, size)
        attend_decode(
            floats(a.x, (a.rows, kv_heads, group, head_dim)),
            floats(a.y, (a.rows, kv_heads, head_dim)),
            floats(a.z, (a.rows, kv_heads, head_dim)),
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


class DecodeOperand:
    """What `attend` reads of a batch, at an address that stays."""

    def __init__(self) -> None:
        self._record = np.zeros((), _ROWS)
        self.address = self._record.ctypes.data

    def point_to(self, decode: DecodeRows) -> None:
        """`decode` has to live until the operations have run."""
        arrays = (decode.rows_B, decode.slots_B, decode.runs_R2, decode.first_run_B)
        rows, slots, runs, first_run = (array.ctypes.data for array in arrays)
        self._record[()] = (len(decode.rows_B), rows, slots, len(decode.runs_R2), runs, first_run)
