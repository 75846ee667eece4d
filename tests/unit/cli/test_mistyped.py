"""What is mistyped on the command line: one line, exit code 2, and what was probably meant."""

import pytest

from apportion.cli.main import exit_code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["export", "p.json", "--to", "llamacpp"],
            "--to: unknown engine 'llamacpp'; did you mean llama.cpp?",
        ),
        (["export", "p.json", "--to", "hf"], "--to: unknown engine 'hf'; did you mean accelerate?"),
        (["plna", "demo"], "unknown command 'plna'; did you mean plan?"),
        (["serve", "demo"], "unknown command 'serve'; did you mean run?"),
        (["plan", "demo", "--contxt", "5"], "unknown option '--contxt'; did you mean --context?"),
        (
            ["plan", "demo", "--max-model-len", "5"],
            "unknown option '--max-model-len'; did you mean --context?",
        ),
        (
            ["plan", "demo", "--objective", "latencyy"],
            "--objective: unknown choice 'latencyy'; did you mean latency",
        ),
        (["plan", "demo", "--context", "8kb"], "'--context': '8kb': unknown unit 'kb'; did you mean k?"),
        (["plan", "demo", "--context", "0"], "'0' is not a whole number from 1"),
        (["plan", "demo", "--ttft-limit", "5 msx"], "unknown unit 'msx'; did you mean ms?"),
        (["plan", "demo", "--tpot-limit", "0"], "'0' is not > 0"),
        (["plan", "demo", "--arrival-rate", "2/week"], "unknown unit '/week'"),
        (["plan", "demo", "--kv-tokens", "8q"], "--kv-tokens '8q' is not a number of tokens"),
        (["plan", "demo", "--weights", "int5"], "unknown weight format 'int5'; did you mean int8 or int4?"),
        (["plan", "lama-3.1-8b"], "did you mean llama-3.1-8b"),
        (["run", "demo", "x", "--swap-space", "64 MiBs"], "unknown unit 'MiBs'; did you mean MiB"),
    ],
)
def test_what_was_probably_meant(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(arguments) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert said in printed.err


def test_quantities_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    """8k is 8192, 2 of 60 a minute are 1/30 a second, and a number alone is of seconds."""
    arguments = ["plan", "llama-3.1-8b", "--devices", "rtx-4090", "--context", "8k", "--prompt-tokens", "1k"]
    limits = [
        "--arrival-rate",
        "2/min",
        "--ttft-limit",
        "2.5 s",
        "--tpot-limit",
        "0.05",
        "--kv-tokens",
        "32k",
    ]
    assert exit_code([*arguments, *limits, "--no-calibration", "--json"]) == 0
    from apportion.planner.plan_file import parse_plan

    asked = parse_plan(capsys.readouterr().out, "stdout").workload
    assert (asked.max_context_tokens, asked.prompt_tokens, asked.kv_tokens) == (8192, 1024, 32768)
    assert (asked.ttft_limit_s, asked.tpot_limit_s) == (2.5, 0.05)
    assert asked.arrival_rate == pytest.approx(1 / 30)
