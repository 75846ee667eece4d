"""Several replicas run side by side, in this process, with real workers."""

import json
from pathlib import Path

import pytest
from contract import is_within

from apportion.cli.main import exit_code

THREE = "a=cpu:40MiB, b=cpu:12MiB@0.5, c=cpu:40MiB@0.5"
PROMPTS = ["ROMEO:", "JULIET:\nO", "First Citizen:", "KING", "What say"]


def test_replicas_give_the_text_of_one_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan, one, both = tmp_path / "plan.json", tmp_path / "one.json", tmp_path / "both.json"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS).replace("JULIET:\nO", "JULIET"))
    asked = ["--prompts", str(prompts), "--max-tokens", "20"]
    assert exit_code(["run", "demo", *asked, "--devices", "whole=cpu:100MiB", "--stats-json", str(one)]) == 0
    made = ["--concurrency", "4", "--context", "64", "--prompt-tokens", "8", "--output-tokens", "20"]
    assert exit_code(["plan", "demo", "--devices", THREE, "--replicas", "2", *made, "--out", str(plan)]) == 0
    capsys.readouterr()
    assert exit_code(["run", "demo", *asked, "--plan", str(plan), "--stats-json", str(both)]) == 0
    shown = capsys.readouterr()
    stats, expected = json.loads(both.read_text()), json.loads(one.read_text())
    texts = [output["text"] for output in expected["outputs"]]
    assert [output["text"] for output in stats["outputs"]] == texts
    assert all(text in shown.out for text in texts)
    served = [[output["prompt"] for output in replica["outputs"]] for replica in stats["replicas"]]
    assert sorted(served[0] + served[1]) == [0, 1, 2, 3, 4]
    assert min(len(prompts) for prompts in served) >= 1
    for replica in stats["replicas"]:
        assert all(is_within(device["peak_bytes"], device["planned_bytes"]) for device in replica["devices"])
        assert all(link["measured_bytes"] == link["predicted_bytes"] for link in replica["links"])
    assert "together" in shown.err


def test_one_of_the_replicas(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan, stats = tmp_path / "plan.json", tmp_path / "stats.json"
    made = ["--concurrency", "2", "--context", "64", "--output-tokens", "8", "--prompt-tokens", "8"]
    assert exit_code(["plan", "demo", "--devices", THREE, "--replicas", "2", *made, "--out", str(plan)]) == 0
    given = ["--plan", str(plan), "--max-tokens", "4", "--stats-json", str(stats)]
    assert exit_code(["run", "demo", "ROMEO:", *given, "--replica", "1"]) == 0
    used = {device["id"] for device in json.loads(stats.read_text())["devices"]}
    document = json.loads(plan.read_text())["replicas"][1]
    assert used == {name for stage in document["stages"] for name in stage["split"]["device_ids"]}
    capsys.readouterr()
    for refused, message in (
        (["run", "demo", "ROMEO:", "--replica", "1"], "--replica 1 takes one of --plan's replicas"),
        (["bench", "demo", "--plan", str(plan)], "has 2 replicas; take one of them: --replica 0 to 1"),
        (["run", "demo", "ROMEO:", "--plan", str(plan), "--replica", "2"], "has no replica 2"),
    ):
        assert exit_code(refused) == 2
        assert message in capsys.readouterr().err
