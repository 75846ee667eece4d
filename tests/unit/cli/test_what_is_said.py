"""What the commands say beside figures: verdicts, options that were not given, who executes a plan, which speed."""

import json
from pathlib import Path

import pytest

from apportion.cli.main import VERBS, exit_code

PLAN = ("plan", "llama-3.2-1b", "--devices", "rtx-3090", "--no-calibration")
TWO = ("plan", "llama-3.2-1b", "--devices", "rtx-3090 + rtx-3060-12gb", "--no-calibration")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert exit_code(list(arguments)) == code
    return capsys.readouterr().out


def test_verify_says_first_whether_the_plan_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "p.json"
    said(capsys, *PLAN, "--out", str(file))
    out = " ".join(said(capsys, "verify", str(file)).split("┌")[0].split())
    count = out.count("│")
    assert out.endswith("checks, made from the file alone, agree with it")
    document = json.loads(file.read_text())
    document["estimate"]["tpot_s"] *= 2
    document["certificate"]["value"] /= 2
    file.write_text(json.dumps(document))
    out = " ".join(said(capsys, "verify", str(file), code=1).split("┌")[0].split())
    assert "is wrong in 2 of" in out or "is wrong in 3 of" in out
    assert out.count("objective") == 1
    assert "estimate" in out
    assert count == 0


def test_options_that_were_given_are_not_advised(capsys: pytest.CaptureFixture[str]):
    assert "more: --details, --why, --compare, --plot plan.svg, --for llama.cpp\n" in said(capsys, *PLAN)
    assert "more: --why, --plot plan.svg, --for llama.cpp\n" in said(capsys, *PLAN, "--details", "--compare")
    assert "more: --details, --compare, --plot plan.svg\n" in said(
        capsys, *PLAN, "--why", "--for", "llama.cpp"
    )


@pytest.mark.parametrize(
    ("devices", "weights", "engines"),
    [
        ("rtx-3090", "bf16", None),
        ("rtx-3090", "int8", None),
        ("rtx-3090", "int4", "another engine (no int4 here): --for llama.cpp, ollama or vllm plans for it"),
        (
            "gtx-1080-ti",
            "int4",
            "another engine (no int4 here): --for llama.cpp, ollama or exllamav3 plans for it",
        ),
        (
            "m2-max-32gb",
            "int4",
            "another engine (no int4 here): --for llama.cpp, ollama or accelerate plans for it",
        ),
        ("rtx-3090", "q4_k_m", "another engine (no q4_k_m here): --for llama.cpp or ollama plans for it"),
        (
            "rtx-3090",
            "awq",
            "another engine (no awq-int4 here): --for vllm, sglang or accelerate plans for it",
        ),
        ("rtx-3090", "exl3-4bpw", "another engine (no exl3-4bpw here): --for exllamav3 plans for it"),
    ],
)
def test_who_executes_what_this_engine_does_not_is_said(
    capsys: pytest.CaptureFixture[str], devices: str, weights: str, engines: str | None
):
    out = " ".join(
        said(
            capsys, "plan", "llama-3.2-1b", "--devices", devices, "--weights", weights, "--no-calibration"
        ).split()
    )
    assert ("runs on" in out) == (engines is not None)
    if engines is not None:
        assert f"runs on {engines}" in out
        engine = engines.split("--for ")[1].split()[0].strip(",")
        assert (
            exit_code(["plan", "llama-3.2-1b", "--devices", devices, "--weights", weights, "--for", engine])
            == 0
        )


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_shows_no_type_of_a_switch_and_no_bound_that_nobody_reaches(
    capsys: pytest.CaptureFixture[str], verb: str
):
    out = said(capsys, *filter(None, [verb, "--help"]))
    assert "bool" not in out
    assert "2147483647" not in out
    assert "--help" in out


def test_bounds_are_kept_all_the_same(capsys: pytest.CaptureFixture[str]):
    assert exit_code([*PLAN, "--concurrency", "0"]) == 2
    assert "--concurrency" in capsys.readouterr().err


def test_tables_say_that_their_speed_has_the_prompts_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = " ".join(said(capsys, *TWO, "--why", "--compare", "--out", str(tmp_path / "p.json")).split())
    assert "planned again (tokens/s with the prompts' time)" in out
    assert "What each device adds (tokens/s with the prompts' time)" in out
    assert "by the same cost model (tokens/s with the prompts' time)" in out
    assert "tokens/s with the prompts' time" in said(capsys, "whatif", str(tmp_path / "p.json"))


def test_a_part_of_a_group_is_a_part_of_every_layer(capsys: pytest.CaptureFixture[str]):
    out = said(capsys, "plan", "llama-3.1-8b", "--devices", "2x rtx-3060-12gb", "--no-calibration")
    assert "50% of every layer" in out


def test_reserved_memory_is_a_column(capsys: pytest.CaptureFixture[str]):
    """Of an RTX 3090: 3 % of 24 GiB and 512 MiB, 1249 MiB."""
    lines = said(capsys, *PLAN, "--details").splitlines()
    heading = next(number for number, line in enumerate(lines) if line.strip() == "Memory") + 1
    assert lines[heading].split() == ["device", "weights", "KV", "workspace", "reserved", "of", "free"]
    assert "1.2 GiB  24.0 GiB" in lines[heading + 1]


def test_constraints_that_cost_only_together(capsys: pytest.CaptureFixture[str]):
    """Over a slow link the old card is used under constraints alone, and each of two brings it in."""
    devices = "a: rtx-3090; b: old=gtx-1080-ti; link a-b 100Mbit 1ms"
    words = ("plan", "llama-3.2-1b", "--devices", devices, "--weights", "fp16", "--no-calibration")
    out = said(capsys, *words, "--use-all")
    assert "more time" in out
    assert "leaving out" not in out
    out = said(capsys, *words, "--use-all", "--pin", "old")
    assert out.count("alone saves nothing") == 2
    assert "they cost only together" in out
    out = said(capsys, *words, "--use-all", "--pin", "old=8-15")
    assert (
        "leaving out --use-all alone saves nothing" in out or "leaving out --pin old=8-15 alone saves " in out
    )
    assert "they cost only together" not in out
