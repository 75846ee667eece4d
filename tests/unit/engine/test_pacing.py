import time

import pytest

from apportion.engine.pacing import Pacer


def compute(seconds: float) -> None:
    begun = time.thread_time()
    while time.thread_time() - begun < seconds:
        pass


@pytest.mark.parametrize("actively", [False, True])
@pytest.mark.parametrize("speed", [0.5, 0.25])
def test_an_emulated_device_takes_its_time(speed: float, actively: bool):
    pacer = Pacer(speed, actively=actively)
    begun = time.perf_counter()
    pacer.start()
    for _ in range(20):
        compute(0.005)
        pacer.settle()
    assert time.perf_counter() - begun == pytest.approx(0.1 / speed, rel=0.15)


def test_waiting_for_a_core_is_not_waited_for_again():
    """A sleep stands for it: 10 ms of 4 ms of computing at half speed."""
    pacer = Pacer(0.5)
    pacer.start()
    compute(0.004)
    time.sleep(0.006)
    before = time.perf_counter()
    pacer.settle()
    assert time.perf_counter() - before < 0.002


def test_little_is_made_up_for():
    pacer = Pacer(0.5)
    pacer.start()
    time.sleep(0.2)
    pacer.settle()
    before = time.perf_counter()
    compute(0.1)
    pacer.settle()
    assert time.perf_counter() - before > 0.14


def test_full_speed_never_sleeps():
    pacer = Pacer(1.0)
    pacer.start()
    compute(0.02)
    before = time.perf_counter()
    pacer.settle()
    assert time.perf_counter() - before < 0.005
