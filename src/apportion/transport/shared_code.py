"""Exchange through shared memory (`shared`), compiled, so that one call may hold many.

numba compiles it when this module is first imported on a machine, and keeps the result on disk.

Shapes: R = members, E = elements of a slot, X = elements exchanged.
"""

from collections.abc import Callable

import numpy as np
from numba import njit, types
from numba.np.numpy_support import carray

from apportion.native.libc import is_hung_up, now_ns, sleep_while, wake_all
from apportion.native.words import load_word, pointer, store_word

LINE_BYTES = 64
"""Each member's counters have a cache line to themselves: how many messages it has published, and, while it sleeps,
1 + the member that it waits for."""
_SLEEPER = 8
"""Where the second one is."""
_LOOKS = 2_000
"""Between two looks at the clock: some microseconds."""
_SLEEP_NS = 5_000_000
"""Between two looks whether the other member is still there."""
_FP32_BYTES = 4

EXCHANGE = np.dtype(
    [(name, "i8") for name in ("rank", "size", "lines", "slots", "elements", "spin_ns", "sockets")]
    + [(name, "i8") for name in ("number", "summed_bytes", "lost")]
)
"""What a member knows: addresses of all members' counters, of their two slots of so many fp32 elements, and of the
sockets' descriptors by rank; the number of the next message; bytes that went to every other member; 1 + the member
that is gone, after which nothing is exchanged any more."""


@njit(inline="always")
def _sleep_until(a, peer, number):
    """Whether the member has counted up to `number`: not where it is gone."""
    word, sleeper = a.lines + peer * LINE_BYTES, a.lines + a.rank * LINE_BYTES + _SLEEPER
    descriptor = carray(pointer(a.sockets), a.size, np.int64)[peer]
    # Before the look at the counter, as the other member counts before it looks here.
    store_word(sleeper, peer + 1)
    seen, gone = load_word(word), False
    while seen < number and not gone:
        sleep_while(word, seen, _SLEEP_NS)
        seen = load_word(word)
        if seen < number and is_hung_up(descriptor):
            seen, gone = load_word(word), True  # it may have counted, and then closed
    store_word(sleeper, 0)
    return seen >= number


@njit(inline="always")
def _await(a, peer, number):
    """Actively at first, and without yielding: on a busy machine that gives the core away for milliseconds."""
    word = a.lines + peer * LINE_BYTES
    stop_ns = 0
    while True:
        for _ in range(_LOOKS):
            if load_word(word) >= number:
                return True
        now = now_ns()
        stop_ns = stop_ns or now + a.spin_ns
        if now >= stop_ns:
            return _sleep_until(a, peer, number)


@njit(inline="always")
def _await_all(a, number):
    for peer in range(a.size):
        if peer != a.rank and a.lost == 0 and not _await(a, peer, number):
            a.lost = peer + 1
    return a.lost == 0


@njit(inline="always")
def _publish(a):
    a.number += 1
    own = a.lines + a.rank * LINE_BYTES
    store_word(own, a.number)
    for peer in range(a.size):
        if load_word(a.lines + peer * LINE_BYTES + _SLEEPER) == a.rank + 1:
            wake_all(own)


def _await_number(address, number):
    """Whether all other members have published so many messages; not where one is gone."""
    return _await_all(carray(pointer(address), 1, EXCHANGE)[0], number)


def _count(address):
    """Publishes what lies in this member's slot."""
    _publish(carray(pointer(address), 1, EXCHANGE)[0])


def _add_up(address, floats, count):
    """Replaces `count` fp32 numbers at an address by the sum over all members, in rank order: once the others have read
    what its slot held, each writes a piece to its slot, and reads the others'."""
    a = carray(pointer(address), 1, EXCHANGE)[0]
    slots_2RE = carray(pointer(a.slots), (2, a.size, a.elements), np.float32)
    a.summed_bytes += count * _FP32_BYTES
    for start in range(0, count, a.elements):
        num = min(a.elements, count - start)
        mine_X = carray(pointer(floats + start * _FP32_BYTES), num, np.float32)
        slots_RE = slots_2RE[a.number % 2]
        if not _await_all(a, a.number):
            return
        mine_E = slots_RE[a.rank]
        for x in range(num):
            mine_E[x] = mine_X[x]
        _publish(a)
        if not _await_all(a, a.number):
            return
        first_E, second_E = slots_RE[0], slots_RE[1]
        for x in range(num):
            mine_X[x] = first_E[x] + second_E[x]
        for rank in range(2, a.size):
            part_E = slots_RE[rank]
            for x in range(num):
                mine_X[x] += part_E[x]


await_number: Callable[[int, int], bool] = njit(
    types.boolean(types.int64, types.int64), nogil=True, cache=True
)(_await_number)
count: Callable[[int], None] = njit(types.void(types.int64), nogil=True, cache=True)(_count)
add_up: Callable[[int, int, int], None] = njit(
    types.void(types.int64, types.int64, types.int64), nogil=True, cache=True, error_model="numpy"
)(_add_up)
