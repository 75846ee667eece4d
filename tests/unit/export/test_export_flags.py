"""Every option that is exported is one that the engine has, by the names recorded in engine_flags/ (which say from
where); for llama.cpp also those of each value that is one of a few."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from exported import export
from unit.export.test_export import gpu, plan_of
from unit.export.test_export_situations import planned

from apportion.planner.plan_file import parse_plan, plan_json

FLAGS = Path(__file__).parent / "engine_flags"


def recorded(engine):
    lines = (FLAGS / f"{engine}.txt").read_text().splitlines()
    assert re.match(r"# .* \d+\.\d+", lines[0]), "where the names are from, with a version"
    return {line for line in lines if line.startswith("-")}


def options(launch, program):
    assert program in launch.command
    return [word for word in launch.command if re.match(r"--?[a-z]", word)]


PIPELINE = plan_of([[1], [1]], [8, 4], [gpu("big", 1, speed=2), gpu("small", 0)])
HOSTS = plan_of([[1], [1]], [5, 7], [gpu("a", 0, host="pc"), gpu("b", 3, host="old")])
GROUP = plan_of([[3, 1]], [12], [gpu("big", 0, speed=2), gpu("small", 1)])


@pytest.mark.parametrize("kv_format", [None, "fp8"])
@pytest.mark.parametrize("plan", [PIPELINE, HOSTS, GROUP], ids=["a pipeline", "two hosts", "a group"])
@pytest.mark.parametrize(("engine", "program"), [("vllm", "serve"), ("sglang", "sglang.launch_server")])
def test_options_are_the_engine_s(engine, program, plan, kv_format):
    if kv_format:
        workload = replace(plan.workload, kv_format=kv_format)
        stages = tuple(replace(stage, kv_format=kv_format) for stage in plan.stages)
        plan = replace(plan, workload=workload, stages=stages)
    launch = export(plan, engine).launches[-1]
    given = options(launch, program)[1 if engine == "sglang" else 0 :]
    assert len(given) >= 8
    assert set(given) - {"-m"} <= recorded(engine)


@pytest.mark.parametrize("plan", [PIPELINE, HOSTS, GROUP], ids=["a pipeline", "two hosts", "a group"])
def test_options_are_llama_cpp_s(plan):
    assert set(options(export(plan, "llama.cpp").launches[-1], "llama-server")) <= recorded("llama_cpp")


def test_options_for_experts_are_llama_cpp_s():
    plan = planned("qwen3-235b-a22b", "int4", "tower: rtx-4090 + cpu:160GiB", 8192)
    given = set(options(export(plan, "llama.cpp").launches[-1], "llama-server"))
    assert "--n-cpu-moe" in given
    assert given <= recorded("llama_cpp")


def test_recorded_names_tell_others_apart():
    """So that the tests here can fail."""
    for engine in ("vllm", "sglang", "llama_cpp"):
        assert "--no-such-option" not in recorded(engine)
        assert len(recorded(engine)) > 200


def test_plans_for_an_engine_are_read_back():
    from apportion.asked.engine_planner import EnginePlanner
    from apportion.export.within import fitted

    made = fitted(PIPELINE, "llama.cpp", EnginePlanner())
    assert parse_plan(plan_json(made), "here") == made
