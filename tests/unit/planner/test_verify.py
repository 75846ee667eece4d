"""A plan that was tampered with does not verify; a plan file that is malformed is refused."""

import json
from dataclasses import replace

import pytest
from planned import cluster, cpu, llama, workload

from apportion.planner.build import make_plan
from apportion.planner.plan_file import parse_plan, plan_json, read_plan, write_plan
from apportion.planner.verify.plan import verify
from apportion.types.errors import PlanError

DEVICES = [cpu("a", 3, 0.5), cpu("b", 3, 1.0), cpu("c", 3, 0.75, host="other")]


@pytest.fixture(scope="module")
def plan():
    made = make_plan(llama(), cluster(DEVICES), workload("throughput", 4), ("fp32",))
    assert len(made.stages) == 2
    assert max(stage.split.size for stage in made.stages) == 2
    return made


def failing(plan):
    return {check.name for check in verify(plan) if not check.ok}


def test_an_honest_plan_holds(plan):
    checks = verify(plan)
    assert all(check.ok for check in checks)
    assert {"layers", "shares", "memory", "objective", "lower bound", "balance", "pipeline"} <= {
        check.name for check in checks
    }


def with_stage(plan, index, **changes):
    stages = list(plan.stages)
    stages[index] = replace(stages[index], **changes)
    return replace(plan, stages=tuple(stages))


def with_split(plan, **changes):
    index = next(i for i, stage in enumerate(plan.stages) if stage.split.size == 2)
    return with_stage(plan, index, split=replace(plan.stages[index].split, **changes))


def test_layers_must_tile(plan):
    stage = plan.stages[0]
    assert failing(with_stage(plan, 0, layer_stop=stage.layer_stop - 1)) == {"layers"}
    assert failing(with_stage(plan, 0, has_embedding=False)) == {"layers"}


@pytest.mark.parametrize("axis", ["q_heads", "kv_heads", "ffn_columns", "vocab_rows"])
def test_shares_must_add_up(plan, axis):
    index = next(i for i, stage in enumerate(plan.stages) if stage.split.size == 2)
    first, second = getattr(plan.stages[index].split, axis)
    assert failing(with_split(plan, **{axis: (first + 1, second)})) == {"shares"}


def test_devices_must_exist_and_be_used_once(plan):
    used = plan.device_ids
    assert failing(with_split(plan, device_ids=(used[0], used[0]))) == {"devices"}
    assert "devices" in failing(
        with_stage(plan, 0, split=replace(plan.stages[0].split, device_ids=("x", "y")))
    )


def test_messages_need_links(plan):
    inside = tuple(link for link in plan.cluster.links if link.src == link.dst)
    assert failing(replace(plan, cluster=replace(plan.cluster, links=inside))) == {"links"}


def test_memory_must_be_as_stated_and_fit(plan):
    name = plan.device_ids[0]
    less = replace(plan.memory[name], weights_bytes=plan.memory[name].weights_bytes - 1)
    assert failing(replace(plan, memory={**plan.memory, name: less})) == {"memory", "conservation"}
    smaller = tuple(replace(device, memory_bytes=2**20) for device in plan.cluster.devices)
    assert "memory" in failing(replace(plan, cluster=replace(plan.cluster, devices=smaller)))
    assert "memory" in failing(replace(plan, num_kv_blocks=plan.num_kv_blocks - 1))


def test_the_objective_is_recomputed(plan):
    certificate = replace(plan.certificate, value=plan.certificate.value * 0.99)
    assert "objective" in failing(replace(plan, certificate=certificate))
    faster = tuple(replace(d, mem_bytes_per_s=2 * d.mem_bytes_per_s) for d in plan.cluster.devices)
    assert "objective" in failing(replace(plan, cluster=replace(plan.cluster, devices=faster)))


def test_the_bound_is_recomputed(plan):
    higher = replace(plan.certificate, lower_bound=plan.certificate.value * 1.01, gap=0.0)
    assert failing(replace(plan, certificate=higher)) == {"lower bound"}
    flattered = replace(plan.certificate, gap=plan.certificate.gap + 0.5)
    assert failing(replace(plan, certificate=flattered)) == {"lower bound"}


def test_estimates_are_recomputed(plan):
    assert failing(replace(plan, estimate=replace(plan.estimate, ttft_s=0.1))) == {"estimate"}
    slower = replace(plan.estimate, link_s=tuple(2 * s for s in plan.estimate.link_s))
    assert failing(replace(plan, estimate=slower)) == {"estimate", "pipeline", "communication"}


def test_balance_is_recomputed(plan):
    assert failing(replace(plan, balance=replace(plan.balance, smallest_epsilon_s=0.0))) == {"balance"}


def test_a_worse_division_of_layers_shows(plan):
    shifted = replace(
        plan,
        stages=(
            replace(plan.stages[0], layer_stop=plan.stages[0].layer_stop - 1),
            replace(plan.stages[1], layer_start=plan.stages[1].layer_start - 1),
        ),
    )
    assert {"memory", "objective", "estimate"} <= failing(shifted)


def test_plans_survive_the_file(plan, tmp_path):
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.update(extra=1), "p: extra: unknown key"),
        (lambda d: d["stages"][0]["split"].update(more=1), r"p: stages\[0\].split.more: unknown key"),
        (lambda d: d["workload"].update(concurrency=-1), "p: workload.concurrency: -1 is not"),
        (lambda d: d["estimate"].update(ttft_s=float("nan")), "p: estimate.ttft_s: nan is not"),
        (lambda d: d["stages"][0]["split"].update(kv_heads="8"), r"p: stages\[0\].split.kv_heads"),
        (lambda d: d.pop("model"), "p: model"),
        (lambda d: d.update(stages=[]), "p: stages: at least one"),
    ],
)
def test_malformed_plans_are_refused_in_one_line(plan, change, message):
    document = json.loads(plan_json(plan))
    change(document)
    with pytest.raises(PlanError, match=message) as caught:
        parse_plan(json.dumps(document), "p")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_plans_are_refused(tmp_path):
    for text in ("", "[]", "{", '{"version": 1}'):
        with pytest.raises(PlanError):
            parse_plan(text, "p")
    with pytest.raises(PlanError, match="cannot read"):
        read_plan(tmp_path / "none.json")
