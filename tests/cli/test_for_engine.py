"""Planning for other engines from the command line: what they do that this one does not is said where nothing fits."""

import pytest

from apportion.cli.main import exit_code

GIB = 2**30


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert exit_code(["plan", *arguments, "--no-calibration"]) == 3
    return capsys.readouterr().err


def test_engines_that_hold_windows_alone_are_named_where_they_would_fit(capsys: pytest.CaptureFixture[str]):
    gemma = ("gemma-3-27b", "--weights", "q4_k_m", "--devices", "rtx-3090", "--context", "64k")
    said = refusal(capsys, *gemma)
    # 62 layers of 16 KV heads of 128 elements, keys and values of 2 bytes; 10 of them see everything, the others 1024
    # tokens and what llama.cpp takes in at once, 512.
    token_bytes = 2 * 16 * 128 * 2
    full = 62 * 65536 * token_bytes / GIB
    windows = (10 * 65536 + 52 * (1024 + 512)) * token_bytes / GIB
    assert f"KV cache of {windows:.1f} GiB instead of {full:.1f} GiB here" in said
    assert "--for vllm, llama.cpp or ollama" in said
    assert exit_code(["plan", *gemma, "--for", "llama.cpp"]) == 0


@pytest.mark.parametrize(
    ("model", "context"),
    [("gemma-3-27b", "128k"), ("llama-3.1-70b", "64k")],
    ids=["windows too large", "no windows"],
)
def test_engines_that_would_not_fit_either_are_not_named(
    capsys: pytest.CaptureFixture[str], model: str, context: str
):
    asked = (model, "--weights", "q4_k_m", "--devices", "rtx-3090", "--context", context)
    assert "--for" not in refusal(capsys, *asked, "--stream", "never")
    assert exit_code(["plan", *asked, "--for", "llama.cpp"]) == 3
