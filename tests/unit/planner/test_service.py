"""Arrival rates, limits and fewest devices: by hand, against single plans, and as typed."""

from dataclasses import replace

import pytest
from planned import cluster, cpu, llama, workload

from apportion.cli.main import exit_code
from apportion.cost.estimate import plan_objective_value
from apportion.cost.service import served_per_s, system_s, tokens_per_request
from apportion.planner.build import make_plan
from apportion.planner.explain.whatif import Changes, what_if
from apportion.planner.plan_file import parse_plan, plan_json
from apportion.planner.problem import sequence_numbers
from apportion.planner.verify.plan import verify
from apportion.types.errors import InfeasibleError

DEVICES = [cpu("a", 6), cpu("b", 6, speed=0.5)]
FP32 = ("fp32",)


def demand(objective="throughput", concurrency=1, **asked):
    return replace(workload(objective, concurrency, context=1024), **asked)


def planned(asked, devices=DEVICES):
    return make_plan(llama(), cluster(devices), asked, FP32)


def test_littles_law_by_hand():
    """4 sequences, 128 tokens each, 10 ms per output token: 0.78 requests a second, each 5.12 s in the system."""
    asked = workload("throughput", 4)
    assert served_per_s(asked, 0.01) == pytest.approx(1 / 1.28)
    assert system_s(asked, 0.01) == pytest.approx(4 * 1.28)
    assert tokens_per_request(asked) == 512 + 128


def test_a_rate_takes_the_fewest_sequences_that_serve_it():
    one, two, three = (planned(demand(concurrency=number)) for number in (1, 2, 3))
    rates = [served_per_s(plan.workload, plan.certificate.value) for plan in (one, two, three)]
    assert rates[0] < rates[1] < rates[2]
    plan = planned(demand(arrival_rate=(rates[1] + rates[2]) / 2))
    assert plan.workload.concurrency == 3
    assert plan.stages == three.stages
    assert planned(demand(arrival_rate=rates[0] * 0.99)).workload.concurrency == 1
    law = next(check for check in verify(plan) if check.name == "Little's law")
    assert law.ok
    assert "3 in flight, 1920 tokens of 640 each" in law.statement
    assert "every stage has KV for 3072" in law.statement
    faster = replace(plan, workload=replace(plan.workload, arrival_rate=rates[2] * 1.01))
    assert [check.name for check in verify(faster) if not check.ok] == ["Little's law"]


def test_a_rate_that_is_too_high_names_the_highest():
    with pytest.raises(
        InfeasibleError, match="100 requests/s cannot be served: the highest rate found is"
    ) as caught:
        planned(demand(arrival_rate=100.0))
    highest = float(str(caught.value).partition("found is ")[2].partition("/s")[0])
    assert planned(demand(arrival_rate=highest * 0.98)).workload.arrival_rate == highest * 0.98


def test_limits_choose_how_many_run_at_once():
    free = planned(demand(concurrency=8))
    limit = planned(demand(concurrency=1)).estimate.tpot_s * 1.05
    assert free.estimate.tpot_s > limit
    plan = planned(demand(concurrency=8, tpot_limit_s=limit))
    assert plan.estimate.tpot_s <= limit
    assert plan.workload.concurrency < 8
    assert plan.workload.most_sequences == 8
    assert plan.certificate.value >= free.certificate.value
    assert plan.certificate.lower_bound <= plan.certificate.value
    assert all(check.ok for check in verify(plan))
    assert parse_plan(plan_json(plan), "plan") == plan
    broken = replace(plan, workload=replace(plan.workload, tpot_limit_s=limit / 2))
    assert "limits" in [check.name for check in verify(broken) if not check.ok]


def test_limits_that_nothing_keeps_are_said():
    with pytest.raises(
        InfeasibleError, match=r"no division found keeps --ttft-limit 1e-06: .* TTFT .* and TPOT"
    ):
        planned(demand(ttft_limit_s=1e-6))


def test_fewest_devices():
    roomy, tight = [cpu("a", 8), cpu("b", 8)], [cpu("a", 3.5), cpu("b", 3), cpu("c", 3)]
    assert len(planned(demand("throughput", 2), roomy).device_ids) == 2
    one = planned(demand("fewest-devices", 2), roomy)
    assert len(one.device_ids) == 1
    assert all(check.ok for check in verify(one))
    assert len(planned(demand("fewest-devices", 2), tight).device_ids) == 2
    limit = one.estimate.tpot_s * 0.9
    assert len(planned(demand("fewest-devices", 2, tpot_limit_s=limit), roomy).device_ids) == 2


@pytest.mark.parametrize(
    ("gib", "asked"),
    [
        (3.5, {"concurrency": 2}),
        (8, {"concurrency": 2, "tpot_limit_s": 0.2}),
        (8, {"concurrency": 2, "ttft_limit_s": 10.0}),
        (8, {"arrival_rate": 0.11}),
    ],
)
def test_that_fewer_devices_would_not_do_is_proven(gib, asked):
    plan = planned(demand("fewest-devices", **asked), [cpu("a", gib), cpu("b", gib), cpu("c", gib)])
    proven, used = plan.certificate.fewest_devices, len(plan.device_ids)
    assert proven is not None
    assert proven.number == used == 2
    assert parse_plan(plan_json(plan), "plan") == plan
    forged = replace(plan.certificate, fewest_devices=replace(proven, number=used + 1))
    checks = {check.name: check.ok for check in verify(replace(plan, certificate=forged))}
    assert not checks.pop("fewest devices")
    assert all(checks.values())


def test_numbers_of_sequences():
    assert sequence_numbers(5) == (1, 2, 3, 4, 5)
    many = sequence_numbers(200)
    assert (many[0], many[-1]) == (1, 200)
    assert len(many) <= 17


def test_a_changed_concurrency_is_the_most_to_choose_from():
    plan = planned(demand(concurrency=4, tpot_limit_s=10.0))
    after = what_if(plan, Changes(concurrency=2))
    assert after.workload.most_sequences == 2
    assert after.workload.concurrency <= 2
    assert plan_objective_value(after) == after.certificate.value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arrival-rate", "1", "--concurrency", "2"], "give either --concurrency or --arrival-rate"),
        (["--objective", "latency", "--tpot-limit", "1"], "--objective latency is of one request alone"),
    ],
)
def test_what_does_not_go_together(words, message, capfd):
    given = ["plan", "llama-3.2-1b", "--devices", "rtx-4090", *words]
    assert exit_code(given) == 2
    assert message in capfd.readouterr().err


def test_the_command_says_what_it_was_asked(capfd):
    words = ["--devices", "2x rtx-4090", "--concurrency", "4", "--tpot-limit", "0.5", "--ttft-limit", "2"]
    assert exit_code(["plan", "llama-3.2-1b", *words]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "keeps a first token within 2.00 s, a token within 500 ms, with 4 at once, at most 4" in shown
    assert exit_code(["plan", "llama-3.2-1b", *words[:2], "--objective", "fewest-devices"]) == 0
    assert "one is the fewest there can be" in " ".join(capfd.readouterr().out.split())
