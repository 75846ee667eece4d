"""Threads that share out a call, with real threads."""

import threading
import time

import numpy as np
import pytest

from apportion.model.kernels.team import Team


def test_every_part_is_computed_once_however_many_calls_there_are():
    for size in (1, 2, 3):
        team, seen = Team(size), np.zeros(10, np.int64)

        def part(start: int, stop: int, seen: np.ndarray = seen) -> None:
            seen[start:stop] += 1

        for call in range(300):
            if call % 100 == 50:
                time.sleep(0.01)  # by now the helpers sleep
            team.run(part, 10)
        assert (seen == 300).all()


def test_two_threads_may_ask_at_once():
    team, seen, lock = Team(2), np.zeros(7, np.int64), threading.Lock()

    def part(start: int, stop: int) -> None:
        with lock:
            seen[start:stop] += 1

    threads = [threading.Thread(target=lambda: [team.run(part, 7) for _ in range(200)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (seen == 400).all()


def test_a_helper_s_error_is_the_caller_s():
    def part(start: int, stop: int) -> None:
        if start > 0:
            raise MemoryError(f"{start} to {stop}")

    team = Team(2)
    for _ in range(2):
        with pytest.raises(MemoryError, match="3 to 6"):
            team.run(part, 6)
