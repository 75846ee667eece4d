"""Makes a worker as slow as the device it emulates."""

import ctypes
import time

_TIMER_SLACK, _LEAST_SLACK_NS = 29, 1
"""Of Linux's prctl(2): by itself the kernel lets a thread sleep some 50 µs longer, to wake it together with others."""


_SHORTEST_SLEEP_S = 5e-5
_MOST_LATE_S = 0.05
"""Of what it was late, a device makes up so much at most."""


class Pacer:
    """What takes `c` seconds of this thread's CPU time takes `c/speed` in all: `settle()` sleeps what is missing.

    CPU time, so that waiting for a core shared with other workers is not computing; it passes all the same, and leaves
    less to sleep. What a sleep overshoots is taken off the next. On a core of its own it waits `actively`: a core that
    slept computes slower for a while.
    """

    def __init__(self, speed: float, *, actively: bool = False) -> None:
        self._speed = speed
        self._debt_s = 0.0
        self._actively = actively
        if speed < 1:
            ctypes.CDLL(None).prctl(_TIMER_SLACK, _LEAST_SLACK_NS, 0, 0, 0)
        self.start()

    def start(self) -> None:
        """What this thread did since `settle()` is not computing."""
        self._computed_s, self._passed_s = time.thread_time(), time.perf_counter()

    def settle(self) -> None:
        if self._speed >= 1:
            return
        computed_s, passed_s = time.thread_time() - self._computed_s, time.perf_counter() - self._passed_s
        self._debt_s = max(self._debt_s + computed_s / self._speed - passed_s, -_MOST_LATE_S)
        if self._debt_s >= _SHORTEST_SLEEP_S:
            begun_s = time.perf_counter()
            if self._actively:
                while time.perf_counter() - begun_s < self._debt_s:
                    pass
            else:
                time.sleep(self._debt_s)
            self._debt_s -= time.perf_counter() - begun_s
        self.start()
