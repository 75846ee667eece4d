"""What real runs leave for the next plan."""

from pathlib import Path

import pytest

from apportion.asked.choices import PlanChoices
from apportion.asked.plan import plan_from_options
from apportion.calibrate.store import calibration_file, read_observations
from apportion.catalog.hub import resolve_model
from apportion.cli.main import exit_code
from apportion.probe.watch import QUIET, Conditions, Watch


def test_the_next_plan_starts_from_what_a_run_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Watch, "conditions", lambda _: QUIET)
    devices = ["--devices", "a=cpu:100MiB"]
    run = ["run", "demo", "ROMEO:", *devices, "--max-tokens", "12", "--ignore-eos"]
    assert exit_code(run) == 0
    assert "no run yet" in " ".join(capsys.readouterr().err.split())
    seen = read_observations(calibration_file(), pytest.fail)
    assert {one.phase for one in seen} >= {"prefill", "decode"}
    assert all(one.weight_format == "fp32" and one.predicted_s > 0 for one in seen)
    assert all((one.waiting_s is not None) == (one.phase == "decode") for one in seen)
    assert exit_code(run) == 0
    assert "calibrated from 1 run here" in " ".join(capsys.readouterr().err.split())
    assert len({one.run for one in read_observations(calibration_file(), pytest.fail)}) == 2
    busy = Conditions(others_share=0.5, clock_hz=None)
    monkeypatch.setattr(Watch, "conditions", lambda _: busy)
    assert exit_code(run) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "cores busy: the next plan learns nothing from this run" in shown
    assert {one.others_share for one in read_observations(calibration_file(), pytest.fail)} == {0.0, 0.5}
    assert exit_code(["plan", "demo", *devices]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "calibrated from 2 runs here, 1 run left out as disturbed" in shown


def test_a_broken_file_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration_file().parent.mkdir()
    calibration_file().write_text("broken")
    assert exit_code(["plan", "demo", "--devices", "a=cpu:100MiB"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("apportion: warning: calibration") == 1
    assert "no run yet" in " ".join(shown.out.split())


def test_no_calibration_neither_reads_nor_says_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration_file().parent.mkdir()
    calibration_file().write_text("broken")
    choices = PlanChoices(
        devices="a=cpu:100MiB",
        cluster=None,
        objective=None,
        context=None,
        concurrency=None,
        prompt_tokens=None,
        output_tokens=None,
        weights=None,
        no_calibration=True,
    )
    plan_from_options(resolve_model("demo", weights=False), choices)
    assert capsys.readouterr().err == ""
