"""What real runs leave for the next plan."""

from pathlib import Path

import pytest

from apportion.calibrate.store import calibration_file, read_observations
from apportion.catalog.hub import resolve_model
from apportion.cli import options
from apportion.cli.main import exit_code
from apportion.runtime.report import DECODE, PREFILL, WorkerReport, WorkMeter
from apportion.types.request import Chunk, SamplingParams, ScheduledBatch

SAMPLING = SamplingParams(max_tokens=1)


def batch(*lengths: int) -> ScheduledBatch:
    chunks = [
        Chunk(sequence_id=i, start=5, token_ids=(0,) * length, block_ids=(0,), sampling=SAMPLING)
        for i, length in enumerate(lengths)
    ]
    return ScheduledBatch(step_id=0, chunks=tuple(chunks))


def test_steps_are_added_up_by_phase_and_mixed_ones_left_out():
    meter = WorkMeter()
    for one in (batch(1, 1), batch(1), batch(4, 3), batch(4, 1)):
        with meter.exchange():
            pass
        meter.end_step(one, 0.5)
    report = WorkerReport(
        device_id="d",
        parameters=0,
        read_bytes=0,
        peak_bytes=0,
        sent_bytes={},
        work=meter.report(),
    )
    decode, prefill = report.phase(DECODE), report.phase(PREFILL)
    assert (decode.num_steps, decode.num_sequences, decode.num_tokens, decode.busy_s) == (2, 3, 3, 1.0)
    assert (prefill.num_steps, prefill.num_tokens, prefill.start_tokens) == (1, 7, 10)
    assert 0 < decode.exchange_s < 0.1
    meter.clear()
    assert meter.work[DECODE].num_steps == 0


def test_the_next_plan_starts_from_what_a_run_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    devices = ["--devices", "a=cpu:100MiB"]
    run = ["run", "demo", "ROMEO:", *devices, "--max-tokens", "12", "--ignore-eos"]
    assert exit_code(run) == 0
    assert "not calibrated" in capsys.readouterr().err
    seen = read_observations(calibration_file(), pytest.fail)
    assert {one.phase for one in seen} >= {"prefill", "decode"}
    assert all(one.weight_format == "fp32" and one.predicted_s > 0 for one in seen)
    assert all((one.waiting_s is not None) == (one.phase == "decode") for one in seen)
    assert exit_code(run) == 0
    assert "calibrated from 1 run on " in capsys.readouterr().err
    assert len({one.run for one in read_observations(calibration_file(), pytest.fail)}) == 2


def test_a_broken_file_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration_file().parent.mkdir()
    calibration_file().write_text("broken")
    assert exit_code(["plan", "demo", "--devices", "a=cpu:100MiB"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("apportion: warning: calibration") == 1
    assert "not calibrated: a" in shown


def test_no_calibration_neither_reads_nor_says_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration_file().parent.mkdir()
    calibration_file().write_text("broken")
    choices = options.PlanChoices(
        devices="a=cpu:100MiB",
        cluster_file=None,
        objective=None,
        context=None,
        concurrency=None,
        prompt_tokens=None,
        output_tokens=None,
        weights=None,
        no_calibration=True,
    )
    options.plan_from_options(resolve_model("demo", weights=False), choices)
    assert capsys.readouterr().err == ""
