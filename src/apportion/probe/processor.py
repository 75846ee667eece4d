"""Which processor this machine has, and how much of it is ours."""

import os
import platform
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
CACHED_PART = 0.75
"""Of a core's part of the last cache, that a streamed layer finds: docs/benchmarks/streaming.md."""
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def num_cores() -> int:
    """Those that this process may use, where the system says which (Linux)."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def memory_bytes() -> int:
    """All of this machine's."""
    import psutil  # plans for other machines do without

    return psutil.virtual_memory().total


def cpu_model() -> str:
    """As the kernel calls it; the architecture where it gives no name (as on many ARM boards)."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def cached_bytes() -> int | None:
    """Of a streamed layer, that one thread still finds in the last cache."""
    per_core = _cache_bytes_per_core()
    return None if per_core is None else int(CACHED_PART * per_core) // 2**20 * 2**20


def _cache_bytes_per_core() -> int | None:
    """Of the last cache, shared evenly by the cores that it serves; None where the kernel does not say."""
    try:
        levels = [(int(_figure(level, "level")), level) for level in _CACHES.glob("index*")]
        _, last = max(levels)
        size = _figure(last, "size")
        shared = _figure(last, "shared_cpu_list").split(",")
        units = {"K": 2**10, "M": 2**20, "G": 2**30}
        return int(size[:-1]) * units[size[-1]] // sum(map(_length, shared))
    except (OSError, ValueError, KeyError):
        return None


def _figure(folder: Path, name: str) -> str:
    return (folder / name).read_text().strip()


def _length(cores: str) -> int:
    """Of "3", or of "0-3"."""
    first, _, last = cores.partition("-")
    return int(last or first) - int(first) + 1
