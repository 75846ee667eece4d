"""Calibration: constants from runs in one shape have to hold in another."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from simulated_runs import (
    ASSUMED,
    MODEL,
    TRUE,
    TRUE_LATENCY_S,
    Work,
    plan_on,
    simulated,
    with_latency,
)

from apportion.calibrate.apply import apply
from apportion.calibrate.observation import Observation, mean_step, observe
from apportion.calibrate.store import KEPT, add_observations, calibration_file, read_observations
from apportion.catalog.cluster_rules import emulate
from apportion.cost.estimate import plan_estimate
from apportion.cost.group_step import group_step_s, stage_members
from apportion.cost.roofline import Step
from apportion.types.cluster import ASSUMED_SPREAD
from apportion.types.plan import Plan


def predicted(seen: Sequence[Observation], groups: list[list[int]], layers: list[int]) -> tuple[Plan, Plan]:
    """(as predicted after calibration, as it truly is)."""
    assumed = with_latency(plan_on(ASSUMED, groups, layers), 6e-5)
    names = dict.fromkeys(assumed.device_ids, "cpu")
    calibrated = replace(assumed, cluster=apply(assumed.cluster, seen, ("fp32",), names).cluster)
    return calibrated, with_latency(plan_on(TRUE, groups, layers), TRUE_LATENCY_S)


SHAPES = [([[1]], [12]), ([[1], [1]], [9, 3]), ([[1], [1], [1]], [4, 4, 4]), ([[1, 1]], [12])]


@pytest.mark.parametrize(("groups", "layers"), SHAPES)
def test_two_shapes_predict_the_others(groups: list[list[int]], layers: list[int]):
    seen = simulated([[1], [1]], [8, 4], run="1") + simulated([[3, 1]], [12], run="2")
    ours, truth = map(plan_estimate, predicted(seen, groups, layers))
    assert ours.tpot_s == pytest.approx(truth.tpot_s, rel=0.04)
    assert ours.ttft_s == pytest.approx(truth.ttft_s, rel=0.08)
    uncalibrated = plan_estimate(with_latency(plan_on(ASSUMED, groups, layers), 6e-5))
    assert abs(uncalibrated.tpot_s / truth.tpot_s - 1) > 0.12


def test_devices_that_share_memory_are_told_from_those_alone():
    """A run of one device says nothing of what its host gives to two, and one of two little of one."""
    truth = replace(TRUE, host_bytes_per_s=2e10)
    guess = replace(ASSUMED, host_bytes_per_s=2.8e10)

    def errors(seen: Sequence[Observation]) -> list[float]:
        """Of the time per token: whole, two stages with two microbatches, group."""
        found = []
        for groups, layers in (([[1]], [12]), ([[1], [1]], [6, 6]), ([[1, 1]], [12])):
            plan = with_latency(plan_on(guess, groups, layers), TRUE_LATENCY_S)
            names = dict.fromkeys(plan.device_ids, "cpu")
            cluster = apply(plan.cluster, seen, ("fp32",), names).cluster
            tpot_s = plan_estimate(replace(plan, cluster=cluster)).tpot_s
            found.append(
                tpot_s / plan_estimate(with_latency(plan_on(truth, groups, layers), TRUE_LATENCY_S)).tpot_s
            )
        return found

    kinds = {"truth": truth, "guess": guess}
    one = simulated([[1]], [12], **kinds) + simulated([[1]], [12], sequences=4, run="2", **kinds)
    two = simulated([[1], [1]], [8, 4], sequences=4, run="3", **kinds)
    whole, stages, group = errors(one)
    assert whole == pytest.approx(1, abs=0.03)
    assert max(stages, group) < 0.9  # the host is still thought to give 2.8e10
    assert errors([*one, *two]) == pytest.approx([1, 1, 1], abs=0.05)
    fitted = apply(plan_on(guess, [[1]], [12]).cluster, one, ("fp32",), {"d0": "cpu"}).cluster.device("d0")
    assert fitted.host_bytes_per_s == pytest.approx(2.8e10)


@pytest.mark.parametrize(("speed", "other"), [(1.0, 0.25), (0.25, 1.0), (0.5, 0.25)])
def test_an_emulated_device_is_the_same_hardware_slowed(speed: float, other: float):
    seen = simulated([[1]], [12], truth=emulate(TRUE, speed), guess=emulate(ASSUMED, speed))
    plan = plan_on(emulate(ASSUMED, other), [[1]], [12])
    fitted = apply(plan.cluster, seen, ("fp32",), {"d0": "cpu"}).cluster
    assert fitted.device("d0").speed == other
    truth = plan_estimate(plan_on(emulate(TRUE, other), [[1]], [12]))
    assert plan_estimate(replace(plan, cluster=fitted)).tpot_s == pytest.approx(truth.tpot_s, rel=0.04)


def test_one_run_of_the_whole_model_predicts_its_stages():
    """Bytes, layers and the step itself cannot be told apart yet: their sum is right, their parts nearly."""
    ours, truth = map(plan_estimate, predicted(simulated([[1]], [12]), [[1], [1]], [6, 6]))
    assert ours.tpot_s == pytest.approx(truth.tpot_s, rel=0.1)


def test_batches_that_compute_rather_than_read_are_predicted_from_prefill_and_decode():
    seen = simulated([[1]], [12]) + simulated([[1], [1]], [8, 4], run="2")
    ours, truth = predicted(seen, [[1]], [12])
    step = Step(sequences=32, new_tokens=1, start_tokens=100, sampled_rows=32)

    def seconds(plan: Plan) -> float:
        return group_step_s(MODEL, stage_members(MODEL, plan.cluster, plan.stages[0]), None, step)

    assert seconds(ours) == pytest.approx(seconds(truth), rel=0.08)


def test_a_disturbed_run_moves_little():
    calm = [one for i in range(6) for one in simulated([[1]], [12], run=str(i))]
    disturbed = [*calm, *simulated([[1]], [12], run="x", disturbed=4.0)]
    ours, truth = map(plan_estimate, predicted(disturbed, [[1]], [12]))
    assert ours.tpot_s == pytest.approx(truth.tpot_s, rel=0.06)


def test_the_spread_narrows_with_agreeing_runs_and_widens_with_disagreeing_ones():
    def spread(seen: Sequence[Observation]) -> float:
        plan = plan_on(ASSUMED, [[1]], [12])
        fitted = apply(plan.cluster, seen, ("fp32",), {"d0": "cpu"}).cluster
        return plan_estimate(replace(plan, cluster=fitted)).uncertainty.tpot

    one = simulated([[1]], [12])
    many = [seen for i in range(8) for seen in simulated([[1]], [12], run=str(i))]
    apart = [
        seen for i in range(8) for seen in simulated([[1]], [12], run=str(i), disturbed=1 + 0.5 * (i % 2))
    ]
    assert ASSUMED_SPREAD.decode > spread(one) > spread(many)
    assert spread(apart) > spread(many)


def test_other_hardware_formats_and_the_unnamed_are_left_alone():
    plan = plan_on(ASSUMED, [[1], [1]], [6, 6])
    seen = simulated([[1]], [12])
    for names, weight_format in (({"d0": "other"}, "fp32"), ({}, "fp32"), ({"d0": "cpu"}, "bf16")):
        calibrated = apply(plan.cluster, seen, (weight_format,), names)
        assert calibrated.cluster == plan.cluster
        assert not calibrated.fits
    partly = apply(plan.cluster, seen, ("fp32",), {"d0": "cpu"})
    assert partly.cluster.device("d1") == plan.cluster.device("d1")
    assert partly.cluster.device("d0") != plan.cluster.device("d0")


def test_the_device_says_so():
    plan = plan_on(ASSUMED, [[1], [1]], [6, 6])
    seen = [one for i in range(3) for one in simulated([[1]], [12], run=str(i))]
    devices = apply(plan.cluster, seen, ("fp32",), {"d0": "cpu"}).cluster.devices
    assert [device.spread.source for device in devices] == [
        "calibrated from 3 runs here",
        ASSUMED_SPREAD.source,
    ]


def test_a_mean_step_has_as_many_tokens_as_steps_have():
    """Five steps of 64 tokens of 12 sequences in all, 2.4 a step."""
    step = mean_step(Work(5, 12, 5 * 64, 24, 10, 1.0, 0.0))
    assert (step.sequences, step.tokens, step.start_tokens, step.sampled_rows) == (2, 64, 2, 2)


def test_what_a_lone_sequence_waits_goes_to_its_messages():
    """20 ms of 25 are the stage's; one message goes in, one out, each with a latency of 60 µs."""

    def calibrated(alone_tpot_s: float | None) -> Plan:
        plan = plan_on(ASSUMED, [[1]], [12])
        work = {
            "d0": {
                "prefill": Work(0, 0, 0, 0, 0, 0.0, 0.0),
                "decode": Work(10, 10, 10, 1230, 10, 0.2, 0.0),
            }
        }
        seen = observe(plan, work, {"d0": "cpu"}, run="1", alone_tpot_s=alone_tpot_s)
        assert [one.phase for one in seen] == ["decode"]
        cluster = apply(plan.cluster, seen * 8, ("fp32",), {"d0": "cpu"}).cluster
        return replace(plan, cluster=cluster, workload=replace(plan.workload, concurrency=1))

    seen, unseen = calibrated(0.025), calibrated(None)
    assert seen.cluster.links[0].hop_s == pytest.approx(2.5e-3 - 6e-5)
    assert plan_estimate(seen).tpot_s == pytest.approx(0.025, rel=0.03)
    assert unseen.cluster.links[0].hop_s == 0
    assert plan_estimate(unseen).tpot_s == pytest.approx(0.0201, rel=0.03)


def test_the_file_keeps_the_newest(tmp_path: Path):
    file = tmp_path / "deep" / "calibration.json"
    assert read_observations(file, pytest.fail) == ()
    for i in range(KEPT + 3):
        add_observations(file, simulated([[1]], [12], run=str(i)), pytest.fail)
    kept = read_observations(file, pytest.fail)
    assert {one.run for one in kept if one.phase == "decode"} == {str(i) for i in range(3, KEPT + 3)}
    assert [path.name for path in file.parent.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"version": 7, "observations": []}',
        '{"version": 2, "observations": [1]}',
        '{"version": 2, "observations": [], "x": NaN}',
        "\x00\xff",
    ],
)
def test_a_file_that_is_no_calibration_is_replaced_after_one_line(tmp_path: Path, content: str):
    file = tmp_path / "calibration.json"
    file.write_text(content, encoding="latin-1")
    warnings: list[str] = []
    assert read_observations(file, warnings.append) == ()
    assert len(warnings) == 1
    assert str(file) in warnings[0]
    assert "\n" not in warnings[0]
    add_observations(file, simulated([[1]], [12]), warnings.append)
    assert len(read_observations(file, pytest.fail)) == 2


def test_times_that_cannot_be_are_refused(tmp_path: Path):
    file = tmp_path / "calibration.json"
    add_observations(file, simulated([[1]], [12]), pytest.fail)
    document = json.loads(file.read_text())
    document["observations"][0]["measured_s"] = -1.0
    file.write_text(json.dumps(document))
    warnings: list[str] = []
    assert read_observations(file, warnings.append) == ()
    assert len(warnings) == 1


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path):
    (tmp_path / "taken").write_text("")
    warnings: list[str] = []
    add_observations(tmp_path / "taken" / "calibration.json", simulated([[1]], [12]), warnings.append)
    assert warnings


def test_the_file_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_file() == tmp_path / "apportion" / "calibration.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert calibration_file() == Path("/home/someone/.cache/apportion/calibration.json")
