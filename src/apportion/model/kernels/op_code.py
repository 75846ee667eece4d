"""Compiled functions of one calling convention, *ops*, and the loop that runs a table of them without Python.

`op(row, number, size)` does part `number` of `size` of one operation, whose operands stand in a row of a table: 64-bit
words, of which the first mean the same in every row (`row_type`). Threads that share a table's operations out among
them meet between two. No op raises.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numba.np.numpy_support import carray

from apportion.native.libc import give_way, sleep_ns
from apportion.native.machine_code import named
from apportion.native.words import call, count_word, load_word, pointer

ROW_WORDS = 20
FP32_BYTES = 4
_HEAD = ("op", "rows", "x", "y", "z", "out")
ROWS_WORD, BUFFER_WORDS = 1, slice(2, 6)
"""Of a row: how many rows (tokens) its operands have, and the addresses of those that lie in scratch memory."""
_LOOKS = 20_000
"""At the others before a thread offers its core to another: some 10 µs."""
_PATIENCE, _NAP_NS = 20, 50_000
"""After so many offers it sleeps between its looks: one of the others waits for another device, or emulates a slow one.
"""


def row_type(*words: str, floats: tuple[str, ...] = ()) -> np.dtype[Any]:
    """Of a row that has these words after those of all."""
    fields = [(name, "i8") for name in (*_HEAD, *words)] + [(name, "f8") for name in floats]
    assert len(fields) <= ROW_WORDS
    return np.dtype(fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    name: str
    address: int
    row_type: "np.dtype[Any]"
    compiled: Any
    """Owns the code."""

    def fill(self, row_W: np.ndarray, **operands: float) -> None:
        """Words that are not named stay as they are."""
        record = row_W[: self.row_type.itemsize // row_W.itemsize].view(self.row_type)
        record["op"] = self.address
        for name, value in operands.items():
            record[name] = value


def op(operands: "np.dtype[Any]", kind: str = "") -> Callable[[Callable[..., None]], Op]:
    """Compiles a function of the address of a row of that type, the number of the part and how many there are; `kind`
    tells it from those that are made alike."""
    signature = types.void(types.intp, types.intp, types.intp)

    def compiled(function: Callable[..., None]) -> Op:
        # With Python's division, which raises, no loop that divides is vectorised.
        code = cfunc(signature, error_model="numpy", cache=True)(named(function, kind))
        assert code.address is not None
        return Op(name=function.__name__, address=code.address, row_type=operands, compiled=code)

    return compiled


@njit(inline="always")
def floats(address, shape):
    """The fp32 array at an address."""
    return carray(pointer(address), shape, np.float32)


@njit(inline="always")
def share(count, number, size):
    """`[start, stop)` of the part."""
    return count * number // size, count * (number + 1) // size


@njit(inline="always")
def _meet(words, size):
    arrived = words.ctypes.data
    everyone = (count_word(arrived) // size + 1) * size
    patience = _PATIENCE
    while True:
        for _ in range(_LOOKS):
            if load_word(arrived) >= everyone:
                return
        if patience > 0:
            patience -= 1
            give_way()
        else:
            sleep_ns(_NAP_NS)


def _run(table_OW, first, stop, words, number, size):
    """Part `number` of `size` of the operations `[first, stop)`; `words` are those of the team (`meeting_words`)."""
    for at in range(first, stop):
        if size > 1 and at > first:
            _meet(words, size)
        row = table_OW.ctypes.data + at * table_OW.itemsize * table_OW.shape[1]
        call(table_OW[at, 0], (row, number, size))


run: Callable[..., None] = njit(
    types.void(types.int64[:, ::1], types.intp, types.intp, types.int64[::1], types.intp, types.intp),
    nogil=True,
    cache=True,
)(_run)


def meeting_words() -> np.ndarray:
    """How many threads have come so far to where they wait for each other."""
    return np.zeros(1, np.int64)
