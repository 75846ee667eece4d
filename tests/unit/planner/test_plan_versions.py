"""Plans of other versions: exit code 2, and one line with the command that plans again."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apportion.cli.main import exit_code
from apportion.planner.outdated import plan_again
from apportion.planner.plan_file import parse_planned, read_planned
from apportion.types.errors import PlanError
from apportion.types.plan import PLAN_VERSION

DEVICES = "a: rtx-3060-12gb:10GiB; b: mine=rtx-3090; link a-b 1Gbit 0.3ms"
ASKED = [
    "plan", "qwen3-8b", "--devices", DEVICES, "--context", "8k", "--concurrency", "3", "--objective", "throughput",
    "--weights", "bf16,int8", "--no-calibration",
]  # fmt: skip


def written(path: Path, *more: str, version: int, without: tuple[str, ...] = ()) -> dict[str, Any]:
    assert exit_code([*ASKED, *more, "--out", str(path)]) == 0
    document = json.loads(path.read_text())
    document["version"] = version
    for key in without:
        del document[key]
    path.write_text(json.dumps(document))
    return document


@pytest.mark.parametrize("version", [PLAN_VERSION - 1, PLAN_VERSION + 1])
@pytest.mark.parametrize("verb", [["verify"], ["whatif"], ["export", "--to", "vllm"]])
def test_the_command_that_plans_again(
    tmp_path: Path, version: int, verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old plan.json"
    before = written(path, version=version, without=("balance",))
    capsys.readouterr()
    assert exit_code([verb[0], str(path), *verb[1:]]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert (
        f"is a plan of version {version}, and this program reads version {PLAN_VERSION}; plan again: " in said
    )
    command = shlex.split(said.partition("plan again: ")[2])
    assert command[:3] == ["apportion", "plan", "qwen3-8b"]
    assert exit_code([*command[1:], "--no-calibration"]) == 0
    after = json.loads(path.read_text())
    assert after["version"] == PLAN_VERSION
    for key in ("cluster", "workload", "weight_formats", "stages", "certificate"):
        assert after[key] == before[key]


def test_replicas_are_asked_for_again(tmp_path: Path) -> None:
    document = written(tmp_path / "p.json", "--replicas", "2", version=PLAN_VERSION - 1)
    command = plan_again(document, "p.json")
    assert "--replicas 2" in command
    assert command.startswith("apportion plan qwen3-8b --cluster p.json --context 8192 --concurrency 3")


def test_what_cannot_be_read_is_left_out() -> None:
    assert plan_again({"version": 1}, "p.json") == "apportion plan MODEL --out p.json"
    odd = {
        "model": {"name": "x y"},
        "cluster": {"devices": 3},
        "workload": {"concurrency": [1]},
        "weight_formats": [],
    }
    assert plan_again(odd, "p.json") == "apportion plan 'x y' --out p.json"


@pytest.mark.parametrize("text", ["", "{", '{"version": ', "[]", "3", "null", "{}", '{"version": true}'])
def test_what_is_no_plan_is_said_in_a_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"is not a plan|is not JSON"):
        read_planned(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("version", "model", "cluster", "workload", "weight_formats", "replicas", "num_asked")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(document=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=7))
def test_any_json_is_refused_in_a_line(document: dict[str, object]) -> None:
    with pytest.raises(PlanError):
        parse_planned(json.dumps(document), "p.json")


@pytest.mark.parametrize("text", ["{}", "[1]", '{"cluster": {"devices": [], "links": []}}', "{"])
def test_a_cluster_is_read_from_plans_alone(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    assert exit_code(["plan", "demo", "--cluster", str(path)]) == 2
    assert "cluster" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed",
    [
        ["--use-all", "--pin", "mine=0-3", "--swap-space", "1GiB"],
        ["--exclude", "a"],
        ["--stage", "mine=0-29", "--stage", "rtx-3060-12gb=30-35"],
        ["--for", "llama.cpp", "--weights", "int4", "--pin", "mine=head"],
        ["--objective", "communication", "--balance", "25%"],
    ],
    ids=lambda words: " ".join(words),
)
def test_what_was_typed_beside_the_workload_is_typed_again(tmp_path: Path, typed: list[str]) -> None:
    path = tmp_path / "old.json"
    before = written(path, *typed, version=PLAN_VERSION - 1)
    command = shlex.split(plan_again(before, str(path)))
    assert exit_code([*command[1:], "--no-calibration"]) == 0
    after = json.loads(path.read_text())
    for key in (
        "cluster",
        "workload",
        "constraints",
        "weight_formats",
        "stages",
        "num_swap_blocks",
        "certificate",
    ):
        assert after[key] == before[key], key


def test_streamed_layers_of_stages_by_hand_are_streamed_again(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    typed = ["plan", "llama-3.1-8b", "--devices", "g=rtx-3060-12gb", "--stage", "g=0-31", "--stream", "auto"]
    assert exit_code([*typed, "--weights", "bf16", "--no-calibration", "--out", str(path)]) == 0
    before = json.loads(path.read_text())
    assert before["stages"][0]["streamed_layers"]
    command = shlex.split(plan_again(before, str(path)))
    assert exit_code([*command[1:], "--no-calibration"]) == 0
    assert json.loads(path.read_text())["stages"] == before["stages"]
