"""Least communication and its balance, by hand: the model of hand_model on two devices of one host.

A step of one sequence, hidden states of 4 × 4 bytes, the link 0.5 s + 16 bytes/s. The coordinator sends a token id of 4
bytes: 0.75 s, to a group of two 8 bytes: 1 s; it gets 4 bytes: 0.75 s. A hop takes 0.5 + 16/16 = 1.5 s.
"""

from dataclasses import replace

import pytest
from command import apportion, small_model
from hand_model import MODEL, device
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.cost.statements import memory_spread, step_communication
from apportion.planner.build import make_plan
from apportion.planner.plan_file import parse_plan, plan_json
from apportion.planner.verify.plan import verify
from apportion.types.cluster import Cluster, Link
from apportion.types.constraints import Constraints
from apportion.types.errors import InfeasibleError
from apportion.types.plan import DeviceMemory
from apportion.types.workload import BalanceLimit, Workload

LINK = Link(src="h", dst="h", latency_s=0.5, bytes_per_s=16.0)
ALONE_S = 0.75 + 0.75
PIPELINE_S = 0.75 + 1.5 + 0.75
GROUP_S = 1 + (2 * 2 + 1) * 1.5 + 0.75
"""Two reductions a layer and one of the embedding; the gathering of logits comes on top: 0.5 s and 4 bytes a row."""


def plan(balance=None, cluster=None, **constraints):
    cluster = cluster or Cluster(devices=(device("a"), device("b")), links=(LINK,))
    asked = Workload(
        prompt_tokens=8,
        output_tokens=4,
        concurrency=1,
        max_context_tokens=16,
        objective="communication",
        balance=balance,
    )
    return make_plan(MODEL, cluster, asked, ("fp32",), Constraints(**constraints))


def rows_elsewhere(made):
    return sum(made.stages[-1].split.vocab_rows[1:])


def test_one_device_alone_hears_from_the_coordinator_only():
    made = plan()
    assert len(made.device_ids) == 1
    assert made.certificate.value == pytest.approx(ALONE_S)
    assert made.certificate.gap <= 2e-6


def test_all_devices_in_use_are_a_pipeline_of_one_hop():
    made = plan(use_all=True)
    assert [stage.split.size for stage in made.stages] == [1, 1]
    assert made.certificate.value == pytest.approx(PIPELINE_S)
    step = step_communication(made.model, made.workload, made.stages)
    assert (step.messages, step.payload_bytes) == (1, 16)


def test_where_the_stages_are_too_unlike_a_group_takes_the_whole():
    """One layer each, but the second has the head: a group is one stage, which is its own mean."""
    made = plan(BalanceLimit(of_mean=0.01), use_all=True)
    assert [stage.split.size for stage in made.stages] == [2]
    gathered_s = 0.5 + 4 * rows_elsewhere(made) / 16
    assert made.certificate.value == pytest.approx(GROUP_S + gathered_s)
    assert made.certificate.gap <= 2e-6
    step = step_communication(made.model, made.workload, made.stages)
    # In both directions five times 16 bytes, and the logits.
    assert (step.messages, step.payload_bytes) == (2 * 5 + 1, 2 * 5 * 16 + 4 * rows_elsewhere(made))


def test_where_nothing_keeps_the_balance_the_error_says_what_can_be_kept():
    with pytest.raises(
        InfeasibleError, match=r"within 1% of the mean.*ask for --balance ([0-9.]+)%"
    ) as error:
        plan(BalanceLimit(of_mean=0.01), use_all=True, groups="none")
    assert "\n" not in str(error.value)
    part = float(str(error.value).split("--balance ")[1].split("%")[0]) / 100
    made = plan(BalanceLimit(of_mean=part), use_all=True, groups="none")
    first, second = made.estimate.stage_s
    # Two stages are as far from their mean as half their difference.
    assert (second - first) / (first + second) <= part * 1.0001
    with pytest.raises(InfeasibleError):
        plan(BalanceLimit(of_mean=0.97 * part), use_all=True, groups="none")


def test_seconds_are_a_limit_too():
    free = plan(use_all=True, groups="none")
    first, second = free.estimate.stage_s
    half_s = abs(first - second) / 2
    assert plan(BalanceLimit(seconds=1.01 * half_s), use_all=True, groups="none").stages == free.stages
    with pytest.raises(InfeasibleError, match=r"ask for --balance [0-9.]+ms"):
        plan(BalanceLimit(seconds=0.9 * half_s), use_all=True, groups="none")


def test_verify_recomputes_it_from_the_file():
    made = parse_plan(plan_json(plan(BalanceLimit(of_mean=0.5), use_all=True)), "plan")
    checks = verify(made)
    assert all(check.ok for check in checks)
    assert "balance asked" in {check.name for check in checks}


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["value", "bound", "balance"]), st.floats(1.02, 5))
def test_verify_finds_what_is_claimed_wrongly(what, factor):
    made = BALANCED
    certificate = made.certificate
    if what == "value":
        claimed = replace(made, certificate=replace(certificate, value=certificate.value * factor))
    elif what == "bound":
        claimed = replace(
            made,
            certificate=replace(
                certificate,
                value=certificate.value,
                lower_bound=certificate.lower_bound * factor,
                gap=certificate.value / (certificate.lower_bound * factor) - 1,
            ),
        )
    else:
        first, second = made.estimate.stage_s
        tight = abs(first - second) / (first + second) / factor
        claimed = replace(made, workload=replace(made.workload, balance=BalanceLimit(of_mean=tight)))
    failed = {check.name for check in verify(claimed) if not check.ok}
    assert {"value": "objective", "bound": "lower bound", "balance": "balance asked"}[what] in failed


BALANCED = plan(BalanceLimit(of_mean=0.9), use_all=True, groups="none")


def test_spread_of_memory_use():
    """30 and 60 of 100 bytes: a mean of 45 %, 30 bytes and points apart, each 15 from the mean."""
    made = BALANCED
    sizes = {"a": 30, "b": 60}
    devices = tuple(replace(one, memory_bytes=100) for one in made.cluster.devices)
    memory = {
        name: DeviceMemory(
            weights_bytes=size, kv_bytes=0, workspace_bytes=0, buffer_bytes=0, reserved_bytes=0
        )
        for name, size in sizes.items()
    }
    spread = memory_spread(replace(made, cluster=replace(made.cluster, devices=devices), memory=memory))
    assert (spread.range_bytes, spread.std_bytes) == (30, 15)
    assert (spread.mean_part, spread.range_part, spread.std_part) == pytest.approx((0.45, 0.3, 0.15))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--balance", "0", "--objective", "communication"], "leaves no room"),
        (["--balance", "0%", "--objective", "communication"], "leaves no room"),
        (["--balance", "5", "--objective", "communication"], "'5' is no percentage of the mean and no time"),
        (["--balance=-3%", "--objective", "communication"], "no percentage"),
        (["--balance", "nan%", "--objective", "communication"], "no percentage"),
        (["--balance", "5%"], "goes with --objective communication, not latency"),
        (["--balance", "20ms", "--objective", "throughput"], "not throughput"),
        (["--objective", "communication", "--tpot-limit", "1"], "rates and limits"),
        (["--objective", "communication", "--arrival-rate", "1"], "rates and limits"),
        (["--objective", "communication", "--stream", "auto"], "leave out --stream"),
        (["--objective", "communication", "--replicas", "auto"], "leave out --replicas"),
    ],
)
def test_what_has_no_meaning_is_refused_in_a_line(small, options, message):
    done = apportion("plan", small, "--devices", "a=cpu:8MiB, b=cpu:9MiB", *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_the_plan_is_shown_beside_the_fastest(small):
    devices = ("--devices", "a=cpu:8MiB, b=cpu:9MiB", "--no-calibration")
    done = apportion("plan", small, *devices, "--objective", "communication", "--balance", "90%", "--details")
    assert done.returncode == 0, done.stderr
    for words in (
        "Proven: no division",
        "within 90% of their mean",
        "this plan",
        "fastest by latency",
        "it costs",
    ):
        assert words in done.stdout
    assert "memory: " in done.stdout
    made = apportion("plan", small, *devices, "--objective", "communication", "--balance", "20ms", "--json")
    assert parse_plan(made.stdout, "stdout").workload.balance == BalanceLimit(seconds=0.02)
