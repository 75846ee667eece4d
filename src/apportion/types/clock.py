"""The one clock that timeouts read, passed to whoever waits: tests pass one that jumps.

What measures work (`time.perf_counter`) or emulates a slow device (the thread's CPU time) reads the machine's own.
"""

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

Taken = TypeVar("Taken")


class Clock(Protocol):
    def now_s(self) -> float:
        """Seconds since any fixed moment."""
        ...

    def sleep(self, seconds: float) -> None: ...

    def wait(self, take: Callable[[float], Taken | None], timeout_s: float) -> Taken | None:
        """What `take`, given a time to wait in seconds, returns within `timeout_s`; None where that has passed."""
        ...


class SystemClock:
    """Time as it passes, but for that in which the machine is asleep."""

    def now_s(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, take: Callable[[float], Taken | None], timeout_s: float) -> Taken | None:
        return take(timeout_s)


SYSTEM_CLOCK = SystemClock()
