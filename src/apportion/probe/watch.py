"""How busy other processes keep this machine while something is measured, and the clock of its processor.

What others use is what all processors spent (`/proc/stat` on Linux, time stolen by other virtual machines included)
less the CPU time of this process and its descendants.
"""

import time
from contextlib import suppress
from dataclasses import dataclass

BUSY_SHARE = 0.1
"""Of a machine's cores; an idle one's other processes take 0.01 to 0.03."""
_TICKS_S = 0.02
"""Counters move by a hundredth of a second, and each process has its own rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """`others_share` of the machine's cores was kept busy by other processes; `clock_hz` is the processor's fastest
    core, None where the system does not say."""

    others_share: float
    clock_hz: float | None

    @property
    def busy(self) -> bool:
        return self.others_share > BUSY_SHARE

    @property
    def statement(self) -> str:
        cores = _cores()
        return f"other processes kept {self.others_share * cores:.1f} of {cores} cores busy"


QUIET = Conditions(others_share=0.0, clock_hz=None)


class Watch:
    """Begins when it is made."""

    def __init__(self) -> None:
        self._begun_s, self._all_s, self._own_s = time.perf_counter(), _all_s(), _own_s()

    def conditions(self) -> Conditions:
        """Since the beginning. Descendants that have ended meanwhile and were not waited for count as others."""
        cores = _cores()
        wall_s = time.perf_counter() - self._begun_s
        others_s = _all_s() - self._all_s - (_own_s() - self._own_s) - _TICKS_S * cores
        return Conditions(others_share=max(0.0, others_s / (wall_s * cores)), clock_hz=clock_hz())


def _cores() -> int:
    import psutil  # plans do without

    return psutil.cpu_count() or 1


def clock_hz() -> float | None:
    import psutil

    try:
        clocks = psutil.cpu_freq(percpu=True)
    except (OSError, NotImplementedError, AttributeError):
        return None
    return max((clock.current * 1e6 for clock in clocks), default=0.0) or None


def _all_s() -> float:
    import psutil

    times = psutil.cpu_times()._asdict()
    # Guests' time is in the user's too.
    return sum(
        seconds for name, seconds in times.items() if name not in ("idle", "iowait", "guest", "guest_nice")
    )


def _own_s() -> float:
    import psutil

    me = psutil.Process()
    total_s = 0.0
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total_s += times.user + times.system + times.children_user + times.children_system
    return total_s
