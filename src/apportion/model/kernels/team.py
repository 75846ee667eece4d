"""Threads that compute the parts of one compiled call side by side.

Between two calls of a step lie microseconds, so helpers wait actively for the next one, and after a while asleep.
Waiting actively and the calls themselves leave Python's lock to others; all else happens under it, which orders it.
"""

import os
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit, types

from apportion.model.kernels.op_code import meeting_words, run
from apportion.native.words import load_word

Part = Callable[[int, int], None]
"""Computes `[start, stop)`; lets go of Python's lock."""

_LOOKS = 100_000
"""Of a helper before it sleeps: some 0.1 ms."""
_STACK_BYTES = 2**18
"""Of a helper: address space counts against a worker's budget."""


def _watch(words, index, known, looks):
    """Returns once the word is no longer `known`, or after `looks`."""
    for _ in range(looks):
        if load_word(words.ctypes.data + index * words.itemsize) != known:
            return


_SIGNATURE = types.void(types.int64[::1], types.intp, types.int64, types.intp)
_await_change: Callable[..., None] = njit(_SIGNATURE, nogil=True, cache=True)(_watch)


class Team:
    """The calling thread and `size - 1` helpers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._words = np.zeros(size, np.int64)
        """The number of calls so far, and how many of them each helper is through with."""
        self._part: Part | None = None
        self._count = 0
        self._error: BaseException | None = None
        self._busy = threading.Lock()
        self._meeting = meeting_words()
        self._asleep = [False] * size
        self._wakes = [threading.Semaphore(0) for _ in range(size)]
        before = threading.stack_size(_STACK_BYTES)
        for number in range(1, size):
            threading.Thread(target=self._help, args=(number,), daemon=True).start()
        threading.stack_size(before)

    def run(self, part: Part, count: int) -> None:
        """`part` of ranges that make up `[0, count)`, one for each thread; of all of it while another thread's runs."""
        if self._size == 1 or not self._busy.acquire(blocking=False):
            part(0, count)
            return
        try:
            self._part, self._count = part, count
            self._call()
        finally:
            self._busy.release()

    def run_ops(self, table_OW: np.ndarray, first: int, stop: int) -> None:
        """The operations `[first, stop)` of a table, each shared out among all threads."""
        if self._size == 1:
            run(table_OW, first, stop, self._meeting, 0, 1)
            return

        def part(number: int, end: int) -> None:
            run(table_OW, first, stop, self._meeting, number, self._size // (end - number))

        self.run(part, self._size)

    def _call(self) -> None:
        self._words[0] += 1
        for number in range(1, self._size):
            if self._asleep[number]:
                self._asleep[number] = False
                self._wakes[number].release()
        self._compute(0)
        self._await_helpers()

    def _await_helpers(self) -> None:
        call = self._words[0]
        for number in range(1, self._size):
            while (done := self._words[number]) != call:
                _await_change(self._words, number, done, _LOOKS)
                os.sched_yield()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _compute(self, number: int) -> None:
        assert self._part is not None
        self._part(self._count * number // self._size, self._count * (number + 1) // self._size)

    def _help(self, number: int) -> None:
        done = 0
        while True:
            _await_change(self._words, 0, done, _LOOKS)
            if self._words[0] == done:
                self._sleep(number, done)
                continue
            done = int(self._words[0])
            try:
                self._compute(number)
            except BaseException as error:
                self._error = error
            self._words[number] = done

    def _sleep(self, number: int, done: int) -> None:
        """Until there is a call, or a wake that came too late for the last one."""
        self._asleep[number] = True
        if self._words[0] == done:
            self._wakes[number].acquire()
        self._asleep[number] = False


team_of = cache(Team)
"""The process's team of a size."""
