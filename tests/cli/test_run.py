"""`apportion run` as a person uses it: in this process, with real workers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from contract import is_within
from parity.tiny_models import make_checkpoint

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.cli.main import exit_code
from apportion.cost.statements import model_parameters

MIB = 2**20
THREE = "laptop=cpu:12MiB@0.5, desk=cpu:13MiB, old=cpu:9MiB@0.3"
PROMPT = "ROMEO:\nBut soft"


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    stats = tmp_path / "stats.json"
    assert exit_code(["run", "demo", *arguments, "--stats-json", str(stats)]) == 0
    return json.loads(stats.read_text())


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """(exit code, the error); whatever is wrong is one line on stderr after the plan, without traceback."""
    code = exit_code(list(arguments))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("apportion: error: ")
    return code, error.removeprefix("apportion: error: ")


def test_three_devices_give_the_text_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """None of the three could hold the model; each stays within its budget, each link carries what was predicted."""
    one = run(tmp_path, PROMPT, "--max-tokens", "60", "--devices", "whole=cpu:100MiB")
    capsys.readouterr()
    three = run(tmp_path, PROMPT, "--max-tokens", "60", "--devices", THREE)
    shown = capsys.readouterr()
    assert three["outputs"] == one["outputs"]
    assert len(one["outputs"][0]["token_ids"]) == 60
    assert shown.out.rstrip("\n") == (PROMPT + one["outputs"][0]["text"]).rstrip("\n")
    assert "emulated" in shown.err
    model = read_model_spec(resolve_model("demo", weights=False))
    assert len(three["devices"]) == 3
    for device in three["devices"]:
        assert device["budget_bytes"] < model_parameters(model) * 4
        assert device["peak_bytes"] > 0
        assert is_within(device["peak_bytes"], device["planned_bytes"])
        assert device["planned_bytes"] <= device["budget_bytes"]
    assert len(three["links"]) >= 2
    for link in three["links"]:
        assert link["measured_bytes"] == link["predicted_bytes"] > 0
    for speeds in (three["measured"], three["predicted"]):
        assert speeds.keys() == {"ttft_s", "tpot_s", "tokens_per_s"}
        assert min(speeds.values()) > 0


def test_a_plan_made_before_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "plan.json"
    arguments = ["--context", "64", "--concurrency", "2", "--prompt-tokens", "8", "--output-tokens", "8"]
    assert exit_code(["plan", "demo", "--devices", THREE, *arguments, "--json", "--out", str(file)]) == 0
    plan = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == plan
    stats = run(tmp_path, PROMPT, "--max-tokens", "20", "--plan", str(file))
    used = [i for stage in plan["stages"] for i in stage["split"]["device_ids"]]
    assert [device["id"] for device in stats["devices"]] == used
    model = read_model_spec(resolve_model("demo", weights=False))
    assert sum(d["parameters"] for d in stats["devices"]) >= model_parameters(model)
    assert all(d["read_bytes"] == 2 * d["parameters"] for d in stats["devices"])  # the files are bf16


def test_prompts_of_a_file_run_together_and_answer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "prompts.txt"
    prompts = ["ROMEO:", "To be, or not to be", "KING HENRY: My lords,", "O"]
    file.write_text("\n".join(prompts) + "\n\n")
    together = run(
        tmp_path, "--prompts", str(file), "--max-tokens", "24", "--devices", "a=cpu:60MiB, b=cpu:60MiB"
    )
    shown = capsys.readouterr().out
    positions = [shown.index(f"[{i + 1}] {prompt}") for i, prompt in enumerate(prompts)]
    assert positions == sorted(positions)
    for i, prompt in enumerate(prompts):
        alone = run(tmp_path, prompt, "--max-tokens", "24", "--devices", "whole=cpu:100MiB")
        assert together["outputs"][i] == alone["outputs"][0] | {"prompt": i}


def test_draws_follow_the_seed_not_the_split(tmp_path: Path):
    sampled = ["--temperature", "0.8", "--top-p", "0.9", "--max-tokens", "24"]
    one = run(tmp_path, PROMPT, *sampled, "--seed", "3", "--devices", "whole=cpu:100MiB")
    three = run(tmp_path, PROMPT, *sampled, "--seed", "3", "--devices", THREE)
    other = run(tmp_path, PROMPT, *sampled, "--seed", "4", "--devices", THREE)
    assert one["outputs"] == three["outputs"] != other["outputs"]


def test_samples_of_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Greedy ones are all alike; drawn ones differ, and the first is what one alone would be."""
    two = ["--devices", "a=cpu:60MiB, b=cpu:60MiB", "--max-tokens", "16"]
    greedy = run(tmp_path, PROMPT, "--n", "3", *two)
    shown = capsys.readouterr()
    assert "[1.3] ROMEO" in shown.out
    assert "blocks saved by sharing" in shown.err
    alone = run(tmp_path, PROMPT, *two)["outputs"][0]
    assert [output["text"] for output in greedy["outputs"]] == [alone["text"]] * 3
    assert [output["sample"] for output in greedy["outputs"]] == [0, 1, 2]
    assert greedy["scheduler"]["peak_saved_blocks"] > 0
    drawn = run(tmp_path, PROMPT, "--n", "3", *two, "--temperature", "0.9", "--seed", "4")["outputs"]
    assert len({output["text"] for output in drawn}) == 3
    assert drawn[0] == run(tmp_path, PROMPT, *two, "--temperature", "0.9", "--seed", "4")["outputs"][0]
    for link in greedy["links"]:
        assert link["measured_bytes"] == link["predicted_bytes"] > 0


def test_a_shared_beginning_is_computed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "prompts.txt"
    system = "ROMEO, a young man of Verona, speaks to Juliet, who stands at her window above the garden: "
    file.write_text("".join(f"{system}{end}\n" for end in ("O", "But", "Alas")))
    stats = run(
        tmp_path, "--prompts", str(file), "--max-tokens", "8", "--devices", "a=cpu:60MiB, b=cpu:60MiB"
    )
    cached = [output["cached_tokens"] for output in stats["outputs"]]
    assert cached[0] == 0 < cached[1] == cached[2]
    assert stats["scheduler"]["cached_tokens"] == sum(cached)
    assert "found in the prefix cache" in capsys.readouterr().err
    for link in stats["links"]:
        assert link["measured_bytes"] == link["predicted_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "demo"], 2, "give either a prompt or --prompts"),
        (["run", "demo", "", "--max-tokens", "5"], 2, "the prompt is empty"),
        (["run", "nowhere/at all", "x"], 2, "is no folder, config.json or hub id"),
        (["run", "demo", "x", "--devices", "a=gpu"], 2, "write it like laptop=cpu:600MiB"),
        (["run", "demo", "x", "--devices", "a=cpu:2MiB, b=cpu:3MiB"], 3, ""),
        (["run", "demo", "x", "--plan", "no-such-plan.json"], 2, "cannot read plan no-such-plan.json"),
        (["run", "demo", "x", "--prompts", "y"], 2, "give either a prompt or --prompts"),
        (["run", "demo", "--prompts", "no-such-file"], 2, "cannot read --prompts no-such-file"),
        (["run", "demo", "one two three four five", "--context", "4"], 2, "--context is 4"),
        (["run", "demo", "x", "--max-tokens", "5000"], 2, "more than demo's 1024"),
        (["run", "demo", "x", "--plan", "p.json", "--context", "64"], 2, "leave out --context"),
        (["run", "demo", "x", "--max-tokens", "none"], 2, "--max-tokens"),
        (["run", "demo", "x", "--swap-space", "much"], 2, "--swap-space: 'much' is not a size"),
        (["run", "demo", "x", "--swap-space", "1KiB"], 2, "is less than a block's"),
        (["run", "demo", "x", "--preempt", "swap"], 2, "--preempt swap needs room"),
        (["run", "demo", "x", "--n", "4", "--concurrency", "2"], 2, "asks for 4 samples"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
):
    failed, error = fails(capsys, *arguments)
    assert (failed, message in error) == (code, True), error


def test_a_plan_of_several_hosts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cluster = tmp_path / "cluster.toml"
    rates = (
        "memory = '20MiB'\nmem_bytes_per_s = 2e10\nflops_per_s = { fp32 = 7e10 }\n"
        "layer_overhead_s = 2e-4\nstep_overhead_s = 0\n"
    )
    devices = "".join(f"[[device]]\nid = '{name}'\nhost = '{name}'\n{rates}" for name in "ab")
    cluster.write_text(devices + "[[link]]\nsrc = 'a'\ndst = 'b'\nlatency_s = 1e-4\nbandwidth = '1Gbit'\n")
    code, error = fails(capsys, "run", "demo", "x", "--cluster", str(cluster), "--max-tokens", "8")
    assert code == 2
    assert "the plan spans hosts a, b" in error


def test_without_the_engine_run_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; from apportion.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "run", "demo", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("apportion: error: running needs torch")
    assert done.stderr.count("\n") == 1


def test_a_plan_for_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, file = tmp_path / "other", tmp_path / "plan.json"
    make_checkpoint("qwen3", folder, num_layers=4)
    assert exit_code(["plan", str(folder), "--out", str(file), "--context", "64"]) == 0
    code, error = fails(capsys, "run", "demo", "x", "--plan", str(file))
    assert code == 2
    assert f"{file} was made for other" in error


def test_a_broken_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    demo = resolve_model("demo", weights=True)
    for file in demo.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: 6 * MIB])
    code, error = fails(capsys, "run", str(tmp_path), "x", "--devices", "a=cpu:60MiB", "--max-tokens", "4")
    assert code == 2
    assert "model.safetensors" in error


def test_an_encoder_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 2}')
    code, error = fails(capsys, "plan", str(tmp_path))
    assert code == 2
    assert "'bert' is an encoder, which cannot be planned" in error
