"""Makes a worker as slow as the device it emulates.

numba compiles it when this module is first imported on a machine, and keeps the result on disk.
"""

import ctypes
from collections.abc import Callable

import numpy as np
from numba import njit, types
from numba.np.numpy_support import carray

from apportion.native.libc import now_ns, sleep_ns, thread_ns
from apportion.native.words import pointer

_TIMER_SLACK, _LEAST_SLACK_NS = 29, 1
"""Of Linux's prctl(2): by itself the kernel lets a thread sleep some 50 µs longer, to wake it together with others."""
_SHORTEST_SLEEP_NS = 50_000
_MOST_LATE_NS = 50_000_000
"""Of what it was late, a device makes up so much at most."""

_PACE = np.dtype(
    [("speed", "f8"), *((name, "i8") for name in ("actively", "debt_ns", "computed_ns", "passed_ns"))]
)
"""How a device is slow, what it has still to sleep, and the clocks' readings when it began to compute."""


@njit(inline="always")
def _begin(a):
    a.computed_ns, a.passed_ns = thread_ns(), now_ns()


@njit(inline="always")
def start(address):
    a = carray(pointer(address), 1, _PACE)[0]
    if a.speed < 1:
        _begin(a)


@njit(inline="always")
def settle(address):
    a = carray(pointer(address), 1, _PACE)[0]
    if a.speed >= 1:
        return
    computed, passed = thread_ns() - a.computed_ns, now_ns() - a.passed_ns
    a.debt_ns = max(a.debt_ns + np.int64(computed / a.speed) - passed, -_MOST_LATE_NS)
    if a.debt_ns >= _SHORTEST_SLEEP_NS:
        begun = now_ns()
        if not a.actively:
            sleep_ns(a.debt_ns)
        while a.actively and now_ns() - begun < a.debt_ns:
            pass
        a.debt_ns -= now_ns() - begun
    _begin(a)


_SIGNATURE = types.void(types.int64)
_start: Callable[[int], None] = njit(_SIGNATURE, nogil=True, cache=True)(lambda address: start(address))
_settle: Callable[[int], None] = njit(_SIGNATURE, nogil=True, cache=True)(lambda address: settle(address))


class Pacer:
    """What takes `c` seconds of this thread's CPU time takes `c/speed` in all: `settle()` sleeps what is missing.

    CPU time, so that waiting for a core shared with other workers is not computing; it passes all the same, and leaves
    less to sleep. What a sleep overshoots is taken off the next. On a core of its own it waits `actively`: a core that
    slept computes slower for a while. Compiled code calls `start` and `settle` with its `address`.
    """

    def __init__(self, speed: float, *, actively: bool = False) -> None:
        self.speed = speed
        self._pace = np.zeros((), _PACE)
        self._pace["speed"], self._pace["actively"] = speed, actively
        self.address = self._pace.ctypes.data
        if speed < 1:
            ctypes.CDLL(None).prctl(_TIMER_SLACK, _LEAST_SLACK_NS, 0, 0, 0)
        self.start()

    def start(self) -> None:
        """What this thread did since `settle()` is not computing."""
        _start(self.address)

    def settle(self) -> None:
        _settle(self.address)
