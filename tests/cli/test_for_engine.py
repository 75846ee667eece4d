"""Planning for other engines from the command line: what they do that this one does not is said where nothing fits."""

import json
import re
from pathlib import Path

import pytest

from apportion.cli.main import exit_code
from apportion.planner.plan_file import read_plan
from apportion.types.plan import Plan

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


def test_a_change_of_a_plan_for_an_engine_has_its_buffers_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """llama.cpp's on each GPU, of a step of 512 tokens: its mask in 2 bytes over the whole context, and logits of
    128,256 in 4; a card that is added has one, and of twice the context it is larger."""
    file, changed = tmp_path / "plan.json", tmp_path / "changed.json"
    asked = ("llama-3.1-8b", "--weights", "q4_k_m", "--devices", "rtx-3070", "--context", "8k")
    assert exit_code(["plan", *asked, "--for", "llama.cpp", "--out", str(file), "--no-calibration"]) == 0

    def after(*change: str) -> Plan:
        capsys.readouterr()
        assert exit_code(["whatif", str(file), *change, "--json"]) == 0
        changed.write_text(json.dumps(json.loads(capsys.readouterr().out)["plan"]))
        assert exit_code(["verify", str(changed)]) == 0
        return read_plan(changed)

    for change, context, devices in [
        (("--add", "rtx-3060-12gb"), 8192, {"rtx-3070", "rtx-3060-12gb"}),
        (("--context", "16k"), 16384, {"rtx-3070"}),
    ]:
        engine = after(*change).constraints.engine
        assert engine is not None
        assert engine.buffer_bytes == dict.fromkeys(devices, 512 * (2 * context + 4 * 128256))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """In one line, as tables break lines where the terminal ends."""
    assert exit_code([*arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_experts_in_host_memory_are_said_where_they_are_faster(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """What the plan says is what export then prints."""
    file = str(tmp_path / "p.json")
    asked = ["plan", "gpt-oss-120b", "--devices", "tower: rtx-4090 + cpu:96GiB", "--context", "32k"]
    said = printed(capsys, *asked, "--no-calibration", "--for", "llama.cpp", "--out", file)
    found = re.search(
        r"faster in llama\.cpp: experts of the first (\d+) layers in the memory of .* on rtx-4090: ([\d.]+) tokens/s",
        said,
    )
    assert found is not None
    exported = printed(capsys, "export", file, "--to", "llama.cpp")
    assert f"--n-cpu-moe {found[1]} " in exported
    assert f"predicted {found[2]} tokens/s with prompts" in exported


def test_nothing_is_said_of_experts_where_there_are_none(capsys: pytest.CaptureFixture[str]):
    asked = ("qwen3-8b", "--devices", "tower: rtx-3060-12gb + cpu:32GiB", "--context", "8k")
    assert "faster in" not in printed(capsys, "plan", *asked, "--no-calibration", "--for", "llama.cpp")


EIGHT_BITS = ("qwen3-14b", "--weights", "int8", "--devices", "home: rtx-3060-12gb + gtx-1060-6gb")


def test_int8_is_no_format_of_gguf_files(capsys: pytest.CaptureFixture[str]):
    assert exit_code(["plan", *EIGHT_BITS, "--no-calibration", "--for", "llama.cpp"]) == 2
    assert "write --weights q8_0" in capsys.readouterr().err


def test_a_plan_in_int8_is_exported_to_llama_cpp_only_where_it_fits_with_its_scales(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """Of 8.5 bits a weight in Q8_0: the 3060's share of the plan, of which 0.1 GiB is free, does not."""
    file = str(tmp_path / "p.json")
    printed(capsys, "plan", *EIGHT_BITS, "--no-calibration", "--out", file)
    assert exit_code(["export", file, "--to", "llama.cpp"]) == 3
    assert "with a Q8_0 file, has 12.0 GiB" in capsys.readouterr().err
    assert exit_code(["export", file, "--to", "vllm"]) in (0, 3)
