"""`apportion run` with less KV cache than its prompts may take: they make room for each other, and say the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from contract import is_within

from apportion.cli.main import exit_code

DEVICES = "laptop=cpu:20MiB@0.5, desk=cpu:20MiB"


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    prompts, stats = tmp_path / "prompts.txt", tmp_path / "stats.json"
    prompts.write_text(
        "\n".join(f"{name}:\nSpeak" for name in ("ROMEO", "JULIET", "NURSE", "TYBALT", "PARIS"))
    )
    drawn = ["--max-tokens", "60", "--ignore-eos", "--devices", DEVICES, "--no-calibration"]
    given = ["run", "demo", "--prompts", str(prompts), *drawn, *arguments, "--stats-json", str(stats)]
    assert exit_code(given) == 0
    return json.loads(stats.read_text())


def test_prompts_that_share_too_little_give_the_same_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = run(tmp_path)
    assert "sequences swapped out" not in capsys.readouterr().err
    short = run(tmp_path, "--kv-tokens", "40%", "--swap-space", "1MiB", "--preempt", "swap")
    shown = capsys.readouterr().err
    assert short["outputs"] == whole["outputs"]
    assert "tokens of KV cache" in shown
    assert "sequences swapped out" in shown
    for device in short["devices"]:
        assert is_within(device["peak_bytes"], device["planned_bytes"])
