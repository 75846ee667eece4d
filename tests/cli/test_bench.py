"""`apportion bench` as a person uses it: in this process, with real workers."""

import json
from pathlib import Path
from typing import Any

import pytest

from apportion.calibrate.store import calibration_file, read_observations
from apportion.cli.main import exit_code

SHORT = ["--concurrency", "1,2", "--prompt-tokens", "12", "--output-tokens", "6", "--rounds", "1"]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def check(result: dict[str, Any], device_ids: list[str]) -> None:
    assert list(result["ceiling_bytes_per_s"]) == device_ids
    assert all(1e8 < rate < 1e12 for rate in result["ceiling_bytes_per_s"].values())
    assert [level["concurrency"] for level in result["levels"]] == [1, 2]
    for level in result["levels"]:
        assert min(*level["measured"].values(), *level["predicted"].values()) > 0
        assert min(level["prefill_tokens_per_s"], level["decode_tokens_per_s"], level["coordinator_s"]) > 0
        assert [device["id"] for device in level["devices"]] == device_ids
        for device in level["devices"]:
            assert sum(device["share"].values()) == pytest.approx(1, abs=0.02)
            assert device["share"]["compute"] > 0
            rate = device["weights_bytes_per_s"]
            assert device["of_ceiling"] == pytest.approx(rate / result["ceiling_bytes_per_s"][device["id"]])


def test_measures_a_config_without_weights_and_writes_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, trace = tmp_path / "config.json", tmp_path / "trace.json"
    config.write_text(json.dumps(CONFIG))
    devices = ["--devices", "a=cpu:40MiB, b=cpu:40MiB@0.5"]
    given = ["bench", str(config), "--random-weights", *SHORT, *devices, "--json", "--trace", str(trace)]
    assert exit_code(given) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    check(result, list(result["ceiling_bytes_per_s"]))
    assert (result["random_weights"], result["rounds"], result["weight_format"]) == (True, 1, "fp32")
    ceiling = next(i for i, line in enumerate(lines) if line.startswith("ceiling: "))
    assert ceiling < next(i for i, line in enumerate(lines) if "Speed" in line)
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [e for e in events if e["name"].startswith("step ")]
    drawing_steps = 3 * (12 + 5)  # of the last stage: every token but each request's last
    assert (
        sum(e["args"]["tokens"] for e in steps if e["pid"] == max(s["pid"] for s in steps)) == drawing_steps
    )
    assert {one.phase for one in read_observations(calibration_file(), pytest.fail)} >= {"prefill", "decode"}


def test_a_given_plan_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "plan.json"
    made = ["plan", "demo", "--devices", "a=cpu:18MiB, b=cpu:18MiB", "--context", "32", "--concurrency", "2"]
    assert exit_code([*made, "--prompt-tokens", "12", "--output-tokens", "6", "--out", str(file)]) == 0
    capsys.readouterr()
    assert exit_code(["bench", "demo", "--plan", str(file), *SHORT, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    check(result, ["a", "b"])
    assert not result["random_weights"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["demo", "--concurrency", "1,none"], 2, "write numbers of sequences, like 1,4,16"),
        (["demo", "--concurrency", "0"], 2, "write numbers of sequences"),
        (["demo", "--concurrency", ""], 2, "write numbers of sequences"),
        (["demo", "--trace", "no/such/folder/t.json"], 2, "there is no folder no/such/folder"),
        (["demo", "--prompt-tokens", "5000"], 2, "more than demo's 1024"),
        (["llama-3-8b"], 2, "can be planned by that name"),
        (["demo", "--devices", "a=cpu:2MiB, b=cpu:3MiB"], 3, ""),
        (["demo", "--plan", "no-such-plan.json"], 2, "cannot read plan"),
        (["demo", "--plan", "p.json", "--context", "64"], 2, "leave out --context"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
):
    failed = exit_code(["bench", *arguments])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("apportion: error: ")
    assert (failed, message in error) == (code, True), error


def test_a_plan_for_less_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "plan.json"
    assert exit_code(["plan", "demo", "--devices", "a=cpu:80MiB", "--context", "32", "--out", str(file)]) == 0
    assert exit_code(["bench", "demo", "--plan", str(file), *SHORT]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "made for 1 sequences of up to 32 tokens, not for 2 of 18" in error
