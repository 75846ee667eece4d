"""A clock that jumps over every wait in which nothing comes, as trio's MockClock does."""

import time
from collections.abc import Callable
from typing import TypeVar

Taken = TypeVar("Taken")

_REAL_S = 0.002
"""How long a wait takes indeed: what comes from another process needs a moment."""


class VirtualClock:
    """See `types.clock.Clock`. With `jumps` False it goes as the machine's does, until that is set."""

    def __init__(self, *, jumps: bool = True) -> None:
        self.jumps = jumps
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds

    def sleep(self, seconds: float) -> None:
        if not self.jumps:
            time.sleep(seconds)
        self._now_s += seconds

    def wait(self, take: Callable[[float], Taken | None], timeout_s: float) -> Taken | None:
        begun_s = time.monotonic()
        taken = take(min(timeout_s, _REAL_S) if self.jumps else timeout_s)
        self._now_s += timeout_s if self.jumps and taken is None else time.monotonic() - begun_s
        return taken
