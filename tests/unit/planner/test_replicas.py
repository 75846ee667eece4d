"""Plans of several replicas: what is chosen, checked, written and refused."""

import json
from dataclasses import replace
from itertools import product
from math import inf, isclose
from pathlib import Path
from random import Random

import numpy as np
import pytest
from planned import cluster, cpu, llama, workload

from apportion.cli.main import exit_code
from apportion.planner.build import make_plan
from apportion.planner.plan_file import parse_plan, parse_planned, plan_json, read_plan, write_plan
from apportion.planner.replicas import build as replicas_module
from apportion.planner.replicas.build import make_replicated_plan, served
from apportion.planner.replicas.device_sets import DeviceSets, sequence_shares
from apportion.planner.replicas.packing import Packings
from apportion.planner.replicas.task import ReplicaSets, Task
from apportion.planner.verify.replicas import verify_replicas
from apportion.types.errors import InfeasibleError, PlanError, UsageError
from apportion.types.plan import Plan
from apportion.types.replicated import ReplicatedPlan

MODEL = llama(num_layers=4)
ASKED = workload("throughput", concurrency=6, context=1024)
FAR = cluster([cpu("a", 4, host="x"), cpu("b", 4, 0.5, host="x"), cpu("c", 4, host="y")])
SMALL = cluster(
    [cpu("a", 0.8, host="x"), cpu("b", 0.8, host="x"), cpu("c", 0.8, host="y"), cpu("d", 0.8, host="y")]
)


def planned(number: int | None = None, **changes) -> ReplicatedPlan:
    return make_replicated_plan(MODEL, FAR, replace(ASKED, **changes), ("bf16",), number)


@pytest.fixture(scope="module")
def plan() -> ReplicatedPlan:
    return planned(2)


def failed(plan: ReplicatedPlan) -> set[str]:
    return {check.name for check in verify_replicas(plan) if not check.ok}


def test_hosts_far_apart_are_replicas():
    """None of the devices holds the model; all sequences are given out."""
    plan = make_replicated_plan(MODEL, SMALL, ASKED, ("bf16",), None)
    hosts = [{device.host for device in one.cluster.devices} for one in plan.replicas]
    assert hosts in ([{"x"}, {"y"}], [{"y"}, {"x"}])
    assert [one.workload.concurrency for one in plan.replicas] == [3, 3]
    single = make_plan(MODEL, SMALL, ASKED, ("bf16",))
    assert served(plan.replicas) > 1.05 / single.certificate.value
    assert isclose(1 / plan.certificate.value, served(plan.replicas))
    assert plan.certificate.gap < 1e-4  # sets beside the plan's are bounded less closely
    assert plan.tokens_per_s == sum(one.estimate.tokens_per_s for one in plan.replicas)
    assert failed(plan) == set()


def test_as_many_as_asked_for():
    rates: dict[int | None, float] = {}
    for number in (None, 1, 2, 3):
        plan = planned(number)
        assert number in (None, len(plan.replicas))
        rates[number] = served(plan.replicas)
    assert max(rates.values()) == pytest.approx(rates[None])
    assert rates[1] < rates[2] < rates[3]


def test_one_replica_is_the_ordinary_plan():
    single, one = make_plan(MODEL, FAR, ASKED, ("bf16",)), planned(1)
    assert isclose(one.certificate.value, single.certificate.value, rel_tol=1e-9)


def test_identical_devices_have_names_of_their_own():
    alike = cluster([cpu(name, 4) for name in "abcd"])
    plan = make_replicated_plan(MODEL, alike, ASKED, ("bf16",), 4)
    assert sorted(plan.device_ids) == ["a", "b", "c", "d"]
    assert sorted(one.workload.concurrency for one in plan.replicas) == [1, 1, 2, 2]
    assert failed(plan) == set()


def test_limits_hold_in_every_replica_and_leave_sequences_out():
    free = planned()
    limit_s = 0.7 * max(one.estimate.tpot_s for one in free.replicas)
    plan = planned(tpot_limit_s=limit_s)
    assert all(one.estimate.tpot_s <= limit_s * (1 + 1e-9) for one in plan.replicas)
    assert plan.workload.concurrency < plan.workload.most_sequences == 6
    assert failed(plan) == set()


def test_too_many_sets_are_guessed_and_bounded(plan: ReplicatedPlan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replicas_module, "MAX_SETS", 0)
    monkeypatch.setattr("apportion.planner.replicas.bound.MAX_SETS", 0)
    guessed = planned(2)
    assert served(guessed.replicas) <= served(plan.replicas) * (1 + 1e-9)
    assert guessed.certificate.lower_bound <= plan.certificate.value
    assert failed(guessed) == set()


def tampered(plan: ReplicatedPlan, name: str) -> ReplicatedPlan:
    first, second = plan.replicas
    certificate = plan.certificate
    return {
        "the same device twice": replace(plan, replicas=(first, first)),
        "a better bound": replace(
            plan,
            certificate=replace(certificate, lower_bound=certificate.lower_bound * 1.01, gap=0.0),
        ),
        "a better value": replace(plan, certificate=replace(certificate, value=certificate.value / 2)),
        "more sequences": replace(plan, workload=replace(plan.workload, concurrency=7)),
        "another number": replace(plan, num_asked=3),
        "a faster device": replace(
            plan,
            replicas=(
                first,
                replace(
                    second,
                    cluster=replace(
                        second.cluster,
                        devices=tuple(replace(d, mem_bytes_per_s=1e12) for d in second.cluster.devices),
                    ),
                ),
            ),
        ),
        "another workload": replace(
            plan, replicas=(first, replace(second, workload=replace(second.workload, output_tokens=1)))
        ),
    }[name]


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("the same device twice", "replicas"),
        ("a better bound", "lower bound"),
        ("a better value", "objective"),
        ("more sequences", "sequences"),
        ("another number", "replicas"),
        ("a faster device", "replicas"),
        ("another workload", "sequences"),
    ],
)
def test_what_was_tampered_with_fails(plan: ReplicatedPlan, name: str, check: str):
    assert check in failed(tampered(plan, name))


def test_a_file_has_everything(plan: ReplicatedPlan, tmp_path: Path):
    assert parse_planned(plan_json(plan), "p") == plan
    file = tmp_path / "plan.json"
    write_plan(plan, file)
    assert read_plan(file, 1) == plan.replicas[1]
    assert isinstance(parse_planned(plan_json(plan.replicas[0]), "p"), Plan)
    for replica, message in ((None, "2 replicas; take one of them: --replica 0 to 1"), (2, "no replica 2")):
        with pytest.raises(PlanError, match=message):
            read_plan(file, replica)
    document = json.loads(plan_json(plan))
    document["replicas"][1]["colour"] = "red"
    with pytest.raises(PlanError, match="colour: unknown key"):
        parse_plan(json.dumps(document), "p")
    document["replicas"] = []
    with pytest.raises(PlanError, match="replicas: at least one"):
        parse_plan(json.dumps(document), "p")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "latency"}, "--objective throughput, not latency"),
        ({"objective": "fewest-devices"}, "not fewest-devices"),
        ({"arrival_rate": 1.0}, "--arrival-rate"),
        ({"kv_tokens": 4096}, "--kv-tokens"),
        ({"concurrency": 2}, "--replicas 3 is more than --concurrency 2"),
    ],
)
def test_workloads_that_do_not_go_with_replicas(changes, message):
    with pytest.raises(UsageError, match=message):
        planned(3, **changes)


def test_no_room_for_so_many():
    with pytest.raises(InfeasibleError, match="3 devices have no room for 4 replicas"):
        planned(4)


def test_shares_are_parts_of_the_sequences():
    assert sequence_shares(5) == (1, 2, 3, 4, 5)
    shares = sequence_shares(100)  # parts of 7, and 2 left over
    assert shares[:4] == (2, 7, 9, 14)
    assert shares[-1] == 100


@pytest.mark.parametrize("num_replicas", [None, 2])
def test_packing_equals_every_choice(num_replicas: int | None):
    random = Random(0)
    devices = cluster([cpu("a", 4), cpu("b", 4), cpu("c", 4, 0.5)])
    task = Task(
        model=MODEL,
        cluster=devices,
        workload=replace(ASKED, concurrency=4),
        weight_formats=("bf16",),
        num_replicas=num_replicas,
    )
    of = ReplicaSets(task)
    for _ in range(20):
        worth = np.array(
            [[random.choice([-inf, random.random()]) for _ in of.shares] for _ in of.sets.counts]
        )
        best = Packings(of).best(worth)
        assert (best[0] if best else -inf) == pytest.approx(every_choice(of, worth))


def every_choice(of: ReplicaSets, worth) -> float:
    """Sets and shares in up to three places."""
    items = [None, *product(range(len(of.sets.counts)), range(len(of.shares)))]
    best = -inf
    for places in product(items, repeat=3):
        chosen = [item for item in places if item]
        used = sum((of.sets.counts[number] for number, _ in chosen), np.zeros(len(of.sets.kinds)))
        given = sum(of.shares[share] for _, share in chosen)
        if given == 4 and (used <= of.sets.available).all() and of.task.num_replicas in (None, len(chosen)):
            best = max(best, sum(worth[item] for item in chosen))
    return best


def test_sets_that_differ_in_names_alone():
    sets = DeviceSets(cluster([cpu("a", 4, host="x"), cpu("b", 4, host="y"), cpu("c", 4, 0.5, host="y")]))
    signatures = [sets.signature(tuple(counts)) for counts in sets.counts.tolist()]
    assert sets.num_sets == len(signatures) == 7
    assert len(set(signatures)) == 6
    assert sets.signature((1, 0, 0)) == sets.signature((0, 1, 0)) != sets.signature((0, 0, 1))


class TestCommandLine:
    GIVEN = (
        "--devices", "tower: 2x rtx-3060-12gb; den: rtx-3060-12gb; link tower-den 1Gbit 0.5ms",
        "--concurrency", "4", "--context", "1024", "--no-calibration",
    )  # fmt: skip

    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
        code = exit_code(list(arguments))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    def test_plan_verify_export(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        file, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
        arguments = (
            "plan",
            "qwen3-4b",
            *self.GIVEN,
            "--replicas",
            "2",
            "--out",
            str(file),
            "--plot",
            str(picture),
        )
        code, out, _ = self.run(capsys, *arguments)
        assert code == 0
        for word in ("2 replicas on", "together", "replica 1", "tokens/s", "Proven"):
            assert word in out
        assert max(len(line) for line in out.splitlines()) <= 100
        assert sorted(path.name for path in tmp_path.iterdir()) == ["plan-0.svg", "plan-1.svg", "plan.json"]
        code, out, _ = self.run(capsys, "verify", str(file))
        assert code == 0
        assert "replica 1" in out
        code, out, _ = self.run(capsys, "export", str(file), "--to", "vllm")
        assert code == 0
        assert out.count("vllm serve") == 2
        assert "# replica 1: 1 of 4 sequences" in out
        code, out, _ = self.run(capsys, "export", str(file), "--to", "vllm", "--replica", "0")
        assert code == 0
        assert out.count("vllm serve") == 1
        for refused in (("export", str(file), "--to", "accelerate"), ("whatif", str(file))):
            code, _, err = self.run(capsys, *refused)
            assert code == 2
            assert "take one of them: --replica 0 to 1" in err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--replicas", "0"), "write a number from 1, or auto"),
            (("--replicas", "some"), "write a number from 1, or auto"),
            (("--replicas", "2", "--why"), "--why is about one pipeline"),
            (("--replicas", "auto", "--compare"), "--compare is about one pipeline"),
            (("--replicas", "2", "--objective", "latency"), "not latency"),
        ],
    )
    def test_refusals(self, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str):
        code, _, err = self.run(capsys, "plan", "qwen3-4b", *self.GIVEN, *arguments)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
