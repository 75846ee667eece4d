"""Which processor this machine has, and how much of it is ours."""

import os
import platform
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """As the kernel calls it; the architecture where it gives no name (as on many ARM boards)."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()
