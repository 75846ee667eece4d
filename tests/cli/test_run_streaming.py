"""`apportion run` of a model that all devices together do not hold."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from contract import is_within

from apportion.cli.main import exit_code

MIB = 2**20
TWO = "a=cpu:6MiB, b=cpu:6MiB@0.5"
PROMPT = "ROMEO:\nBut soft"
SMALL = ["--context", "64", "--prompt-tokens", "8", "--output-tokens", "8", "--no-calibration"]


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    stats = tmp_path / "stats.json"
    given = ["run", "demo", PROMPT, "--max-tokens", "20", *arguments, "--stats-json", str(stats)]
    assert exit_code(given) == 0
    return json.loads(stats.read_text())


def test_streaming_gives_the_text_of_one_device(tmp_path: Path):
    file = tmp_path / "plan.json"
    assert exit_code(["plan", "demo", "--devices", TWO, *SMALL, "--out", str(file)]) == 0
    assert exit_code(["verify", str(file)]) == 0
    plan = json.loads(file.read_text())
    weights = sum(m["weights_bytes"] + m["streamed_bytes"] for m in plan["memory"].values())
    assert weights > 18 * MIB  # more than both have
    held = run(tmp_path, "--devices", "whole=cpu:100MiB", *SMALL)
    streamed = run(tmp_path, "--plan", str(file))
    assert streamed["outputs"] == held["outputs"]
    assert sum(memory["streamed_bytes"] for memory in plan["memory"].values()) > 10 * MIB
    steps = len(streamed["outputs"][0]["token_ids"])
    for device in streamed["devices"]:
        memory = plan["memory"][device["id"]]
        assert device["streamed_bytes"] == steps * memory["streamed_bytes"]
        assert device["read_bytes"] == 2 * device["parameters"]  # the files are bf16
        assert device["peak_bytes"] > 0
        assert is_within(device["peak_bytes"], device["planned_bytes"])
        assert device["planned_bytes"] <= 9 * MIB


def test_a_device_that_streams_alone_keeps_to_its_plan(tmp_path: Path):
    """Embedding, streamed layers and head on one device, several sequences at once."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ROMEO:\nJULIET:\nKING:\nOnce upon\n")
    stats = tmp_path / "stats.json"
    shape = [
        "--context",
        "128",
        "--concurrency",
        "4",
        "--max-tokens",
        "60",
        "--ignore-eos",
        "--no-calibration",
    ]
    given = ["run", "demo", "--prompts", str(prompts), "--devices", "a=cpu:20MiB", *shape]
    assert exit_code([*given, "--stats-json", str(stats)]) == 0
    (device,) = json.loads(stats.read_text())["devices"]
    assert device["streamed_bytes"] > 0
    assert is_within(device["peak_bytes"], device["planned_bytes"])


def test_streaming_is_refused_or_offered(capsys: pytest.CaptureFixture[str]):
    assert exit_code(["plan", "demo", "--devices", TWO, *SMALL, "--stream", "never"]) == 3
    assert "try --stream auto" in capsys.readouterr().err
    assert exit_code(["plan", "demo", "--devices", "a=cpu:3MiB", *SMALL]) == 3
    error = capsys.readouterr().err
    assert "1 device has 3.0 MiB" in error
    assert "--stream" not in error


def test_the_plan_says_what_is_streamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "plan.svg"
    assert (
        exit_code(["plan", "demo", "--devices", TWO, *SMALL, "--plot", str(picture), "--why", "--details"])
        == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"of host memory \(the page cache\), at .* GB/s, which it copies itself", shown)
    assert re.search(r"so a decode step of stage 0 takes [\d.]+ [mµ]s longer", shown)
    assert re.search(
        r"[\d.]+ MiB streamed out of the memory of local, [\d.]+ MiB of its devices in it, which", shown
    )
    assert 'data-kind="streamed"' in picture.read_text()
