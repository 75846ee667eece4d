"""A machine that was busy, slowed or used for the first time does not spoil later predictions."""

import json
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from simulated_runs import ASSUMED, TRUE, plan_on, simulated

from apportion.calibrate.apply import apply
from apportion.calibrate.observation import Observation
from apportion.calibrate.quiet import undisturbed
from apportion.calibrate.store import add_observations, read_observations
from apportion.probe import watch
from apportion.probe.watch import Conditions, Watch
from apportion.types.cluster import ASSUMED_SPREAD, Device

GOOD = [one for i in range(4) for one in simulated([[1]], [12], run=f"good {i}", disturbed=1 + 0.01 * i)]


def disturbed(factor: float, run: str = "bad", **marked: float) -> list[Observation]:
    return [replace(one, **marked) for one in simulated([[1]], [12], run=run, disturbed=factor)]


def learned(seen: list[Observation]) -> Device:
    return apply(plan_on(ASSUMED, [[1]], [12]).cluster, seen, ("fp32",), {"d0": "cpu"}).cluster.devices[0]


def without_words(device: Device) -> Device:
    return replace(device, spread=replace(device.spread, source=""))


@pytest.mark.parametrize(
    "bad",
    [
        [one for i in range(8) for one in disturbed(2.0 + i, f"busy {i}", others_share=0.5)],
        disturbed(6.0, "first use"),
        disturbed(2.0, "first use") + disturbed(0.4, "another kernel"),
    ],
)
def test_disturbed_runs_change_neither_rates_nor_what_is_expected(bad: list[Observation]):
    assert without_words(learned(GOOD + bad)) == without_words(learned(GOOD))
    number = len({one.run for one in bad})
    words = f"calibrated from 4 runs here, {number} run{'s' if number > 1 else ''} left out as disturbed"
    assert learned(GOOD + bad).spread.source == words
    assert learned(GOOD + bad).spread.decode < 0.15


def test_four_runs_on_a_busy_machine_teach_nothing():
    busy = [one for i in range(4) for one in disturbed(1.5 + i, str(i), others_share=0.8)]
    device = learned(busy)
    assert without_words(device) == without_words(plan_on(ASSUMED, [[1]], [12]).cluster.devices[0])
    assert device.spread.decode == ASSUMED_SPREAD.decode
    assert device.spread.source == f"{ASSUMED_SPREAD.source}, 4 runs left out as disturbed"


def test_a_slower_clock_is_another_machine():
    """2 of 4 GHz take twice as long; 3.6 GHz are within what turbo steps vary by."""
    usual = [replace(one, clock_hz=4e9) for one in GOOD]
    slow = disturbed(2.0, clock_hz=2e9)
    near = disturbed(1.0, clock_hz=3.6e9)
    assert undisturbed([*slow, *usual, *near]) == [*usual, *near]
    assert without_words(learned(usual + slow)) == without_words(learned(usual))
    assert undisturbed(slow) == slow  # none is faster
    assert undisturbed(usual + disturbed(1.0)) == usual + disturbed(1.0)  # not known


def test_runs_that_scatter_are_no_outliers():
    """Ratios of 1.0 to 1.3 lie within one and a half times their median."""
    scattered = [one for i in range(7) for one in disturbed(1 + 0.05 * i, f"run {i}")]
    assert learned(scattered).spread.source == "calibrated from 7 runs here"
    assert learned(scattered).mem_bytes_per_s != TRUE.mem_bytes_per_s


def test_a_machine_that_changed_is_learned_again():
    """Once more runs are of the new than of the old."""
    changed = [one for i in range(9) for one in disturbed(3.0, f"new {i}")]
    assert learned(GOOD[:2] + changed).spread.source.startswith("calibrated from 9 runs here")


def test_they_stay_in_the_file(tmp_path):
    bad = disturbed(3.0, others_share=0.5, clock_hz=2e9)
    add_observations(tmp_path / "c.json", bad, pytest.fail)
    assert read_observations(tmp_path / "c.json", pytest.fail) == tuple(bad)


def test_a_file_without_conditions_is_read(tmp_path):
    file = tmp_path / "c.json"
    add_observations(file, GOOD, pytest.fail)
    document = json.loads(file.read_text())
    for one in document["observations"]:
        del one["others_share"], one["clock_hz"]
    file.write_text(json.dumps(document))
    assert sorted(map(str, read_observations(file, pytest.fail))) == sorted(map(str, GOOD))


class Machine:
    """Two cores, of which this process and its children use one by themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = self.all_s = self.own_s = 100.0
        monkeypatch.setattr(watch.time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(watch, "_all_s", lambda: self.all_s)
        monkeypatch.setattr(watch, "_own_s", lambda: self.own_s)
        monkeypatch.setattr(psutil, "cpu_count", lambda: 2)

    def works(self, seconds: float, *, own: float, others: float) -> None:
        self.now_s += seconds
        self.own_s += own
        self.all_s += own + others


@pytest.mark.parametrize(
    ("seconds", "own", "others", "share", "busy"),
    [
        (10.0, 10.0, 0.3, 0.013, False),  # (0.3 − 0.04) of 20
        (10.0, 10.0, 8.0, 0.398, True),
        (0.1, 0.1, 0.03, 0.0, False),  # three ticks in a tenth of a second say nothing
        (10.0, 20.0, -0.1, 0.0, False),
    ],
)
def test_what_others_use_is_what_all_use_less_our_own(
    seconds: float, own: float, others: float, share: float, busy: bool, monkeypatch: pytest.MonkeyPatch
):
    machine = Machine(monkeypatch)
    begun = Watch()
    machine.works(seconds, own=own, others=others)
    seen = begun.conditions()
    assert seen.others_share == pytest.approx(share)
    assert seen.busy is busy


def test_it_is_said_in_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda: 8)
    seen = Conditions(others_share=0.25, clock_hz=None)
    assert seen.statement == "other processes kept 2.0 of 8 cores busy"


def test_the_clock_is_that_of_the_fastest_core(monkeypatch: pytest.MonkeyPatch):
    clocks = [SimpleNamespace(current=800.0), SimpleNamespace(current=3900.0)]
    monkeypatch.setattr(psutil, "cpu_freq", lambda **_: clocks)
    assert watch.clock_hz() == 3.9e9
    monkeypatch.setattr(psutil, "cpu_freq", lambda **_: [])
    assert watch.clock_hz() is None
