"""Models and clusters by name, from the command line and without a network."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from apportion.cli.main import exit_code
from apportion.planner.plan_file import read_plan
from apportion.planner.verify.plan import verify


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def plan(out: Path, model: str, devices: str, *more: str) -> int:
    return exit_code(["plan", model, "--devices", devices, "--out", str(out), *more])


@pytest.mark.parametrize(
    ("model", "devices", "weight_format"),
    [
        ("llama-3.2-1b", "rtx-4090", "bf16"),
        ("Qwen/Qwen3-0.6B", "a: rtx-2080-ti; b: rtx-3060-12gb; link a-b 1Gbit 0.3ms", "fp16"),
        ("qwen3-0.6b", "m1 + rx-7900-xtx", "fp16"),
        ("glm-4-9b", "2x rtx-3060-12gb", "bf16"),
    ],
)
def test_a_plan_by_name(model: str, devices: str, weight_format: str, tmp_path: Path):
    """A format that every device has a rate for is taken: bf16 came with Ampere."""
    out = tmp_path / "plan.json"
    assert plan(out, model, devices, "--context", "1024") == 0
    made = read_plan(out)
    assert made.stages[0].weight_format == weight_format
    assert all(check.ok for check in verify(made))
    assert json.loads(out.read_text())["cluster"]["devices"][0]["source"] == "datasheet"


@pytest.mark.parametrize(
    ("model", "devices", "message"),
    [
        ("llama-3.2-2b", "rtx-4090", "did you mean llama-3.2"),
        ("llama-3.2-1b", "rtx-4091", "did you mean rtx-4090"),
    ],
)
def test_near_names(
    model: str, devices: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert plan(tmp_path / "plan.json", model, devices) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
