"""Holds a worker to a memory budget in the machine's own memory, and measures the peak of what it allocated.

The budget counts from `start()`, after imports and warm-up. The kernel enforces it (RLIMIT_DATA: private writable
memory), and the peak is the resident anonymous memory above the start.
"""

import ctypes
import resource
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_LARGE_BYTES = 2**14
"""What is freed in one piece of this size or more goes back to the kernel at once. By itself glibc raises the limit to
the largest that was ever freed, and so keeps megabytes of holes between the weights; pieces of up to 64 KiB that differ
from step to step would leave some 0.5 MiB of them."""
_ARENA_BYTES = 2**20
_SMALL_BYTES = 2**8
"""Of an object that lies in an arena."""
_KEPT_BYTES = 2**18
"""What a process may keep when it gives up a place: code's first use, and pages of small objects of which some live. It
was 0.20 to 0.25 MB after one to four places of the demo model; what is more counts as the next place's."""
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Written to clear_refs: VmHWM starts again from the present resident size (Linux, proc(5))."""


def _status_bytes(*fields: str) -> tuple[int, ...]:
    values = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return tuple(int(values[field].split()[0]) * 1024 for field in fields)


def _open_arena() -> bytes:
    """Python maps memory for small objects a mebibyte at once, of which the stage's fill little; but all of it would
    count against the limit. Afterwards there is such an arena as long as the object is kept."""
    kept: list[bytes] = []
    (before,) = mapped = _status_bytes("VmData")
    while mapped[0] < before + _ARENA_BYTES:
        kept += [bytes(_SMALL_BYTES) for _ in range(_ARENA_BYTES // _SMALL_BYTES // 8)]
        mapped = _status_bytes("VmData")
    return kept[-1]


def lift_limit() -> None:
    """Ends the enforcement on a CPU: a worker out of memory needs some to say so."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


class CpuMeter:
    """See `MemoryMeter`."""

    def __init__(self) -> None:
        self._arena: bytes | None = None
        self._start_bytes = self._start_data_bytes = 0
        self._left_bytes = self._left_data_bytes = 0
        """What earlier places left, beyond what a process keeps."""

    def start(self, budget_bytes: int) -> None:
        _LIBC.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        _LIBC.mallopt(_TRIM_THRESHOLD, _LARGE_BYTES)
        self._arena = _open_arena()
        _LIBC.malloc_trim(0)  # what warming up left would be taken for the stage's later, and not be counted
        anonymous_bytes, data_bytes = _status_bytes("RssAnon", "VmData")
        self._start_bytes = anonymous_bytes - self._left_bytes
        self._start_data_bytes = data_bytes - self._left_data_bytes
        self._peak_bytes = self._most_resident_bytes = self._host_bytes = 0
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (self._start_data_bytes + budget_bytes, hard))

    def left(self) -> None:
        if not self._start_bytes:
            return
        lift_limit()
        _LIBC.malloc_trim(0)
        anonymous_bytes, data_bytes = _status_bytes("RssAnon", "VmData")
        self._left_bytes = max(0, anonymous_bytes - self._start_bytes - _KEPT_BYTES)
        self._left_data_bytes = max(0, data_bytes - self._start_data_bytes)

    def observe(self) -> None:
        _LIBC.malloc_trim(0)  # glibc keeps freed megabytes, which are nobody's
        (anonymous_bytes,) = _status_bytes("RssAnon")
        self._peak_bytes = max(self._peak_bytes, anonymous_bytes - self._start_bytes)

    def loaded(self, host_bytes: int) -> None:
        self.observe()
        _CLEAR_REFS.write_text(_RESET_PEAK)
        self._host_bytes = host_bytes

    def stepped(self) -> None:
        """The kernel's own peak, less the file pages of now: a step may be the first to run some code, whose pages are
        no memory of the device."""
        resident_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if resident_bytes > self._most_resident_bytes:
            self._most_resident_bytes = resident_bytes
            (file_bytes,) = _status_bytes("RssFile")
            own_bytes = resident_bytes - file_bytes - self._host_bytes - self._start_bytes
            self._peak_bytes = max(self._peak_bytes, own_bytes)

    def peak_bytes(self) -> int:
        self.observe()
        return self._peak_bytes
