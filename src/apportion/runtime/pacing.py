"""Makes a worker as slow as the device it emulates."""

import ctypes
import time

_TIMER_SLACK, _LEAST_SLACK_NS = 29, 1
"""Of Linux's prctl(2): by itself the kernel lets a thread sleep some 50 µs longer, to wake it together with others."""


class Pacer:
    """After `c` seconds of this thread's CPU time, `settle()` sleeps `c·(1/speed − 1)`; speed 1 never sleeps.

    CPU time, so that a core shared with other workers is not counted twice. What a sleep overshoots is taken off
    the next. On a core of its own it waits `actively`: a core that slept computes slower for a while.
    """

    _SHORTEST_SLEEP_S = 5e-5

    def __init__(self, speed: float, *, actively: bool = False) -> None:
        self._delay_per_s = 1 / speed - 1
        self._debt_s = 0.0
        self._actively = actively
        if self._delay_per_s > 0:
            ctypes.CDLL(None).prctl(_TIMER_SLACK, _LEAST_SLACK_NS, 0, 0, 0)
        self._mark_s = time.thread_time()

    def start(self) -> None:
        """What this thread did since `settle()` is not computing."""
        if self._delay_per_s > 0:
            self._mark_s = time.thread_time()

    def settle(self) -> None:
        if self._delay_per_s <= 0:
            return
        self._debt_s += (time.thread_time() - self._mark_s) * self._delay_per_s
        if self._debt_s >= self._SHORTEST_SLEEP_S:
            begun_s = time.perf_counter()
            if self._actively:
                while time.perf_counter() - begun_s < self._debt_s:
                    pass
            else:
                time.sleep(self._debt_s)
            self._debt_s -= time.perf_counter() - begun_s
        self._mark_s = time.thread_time()
