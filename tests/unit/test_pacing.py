import time

import pytest

from apportion.runtime.pacing import Pacer


def compute(seconds: float) -> None:
    begun = time.thread_time()
    while time.thread_time() - begun < seconds:
        pass


@pytest.mark.parametrize("actively", [False, True])
@pytest.mark.parametrize("speed", [0.5, 0.25])
def test_an_emulated_device_takes_its_time(speed: float, actively: bool):
    pacer = Pacer(speed, actively=actively)
    begun, slept = time.perf_counter(), 0.0
    pacer.start()
    for _ in range(20):
        compute(0.005)
        before = time.perf_counter()
        pacer.settle()
        slept += time.perf_counter() - before
    assert time.perf_counter() - begun >= 0.1 / speed * 0.99
    assert slept == pytest.approx(0.1 * (1 / speed - 1), rel=0.15)


def test_full_speed_never_sleeps():
    pacer = Pacer(1.0)
    pacer.start()
    compute(0.02)
    before = time.perf_counter()
    pacer.settle()
    assert time.perf_counter() - before < 0.005
