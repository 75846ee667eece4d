"""Divisions by hand, and constraints on the search."""

import json
from dataclasses import replace

import pytest
from planned import GIB, cluster, cpu, llama, workload

from apportion.asked.by_hand import read_constraints
from apportion.cli.main import exit_code
from apportion.planner.build import fits, make_plan
from apportion.planner.explain.constrained import cost_of_constraints
from apportion.planner.plan_file import parse_plan, plan_json
from apportion.planner.verify.plan import verify
from apportion.types.constraints import UNCONSTRAINED, Constraints, FixedStage, Pin
from apportion.types.errors import InfeasibleError, UsageError

A, B, C = cpu("a", 6), cpu("b", 6, 0.7), cpu("c", 6, 0.4, host="far")
THREE = cluster([A, B, C])
FP32 = ("fp32",)


def stage(ids, start, stop, shares=()):
    return FixedStage(device_ids=tuple(ids.split("+")), layer_start=start, layer_stop=stop, shares=shares)


def planned(constraints, where=THREE, asked=None, **options):
    return make_plan(llama(), where, asked or workload(), FP32, constraints, **options)


def laid(plan):
    return [("+".join(one.split.device_ids), one.layer_start, one.layer_stop) for one in plan.stages]


@pytest.mark.parametrize(
    ("constraints", "stages"),
    [
        (Constraints(stages=(stage("c", 0, 2), stage("a", 2, 12))), [("c", 0, 2), ("a", 2, 12)]),
        (Constraints(stages=(stage("b+a", 0, 3), stage("c", 3, 12))), [("a+b", 0, 3), ("c", 3, 12)]),
        (Constraints(stages=(stage("c", 5, 6),), excluded=("b",)), None),
    ],
)  # fmt: skip
def test_stages_are_as_they_were_laid_down(constraints, stages):
    """In the last case a is before and after c, which a device cannot be: nothing fits without the excluded one."""
    if stages is None:
        with pytest.raises(InfeasibleError, match="without --exclude b or without --stage c=5 a plan exists"):
            planned(constraints)
        return
    plan = planned(constraints)
    assert laid(plan) == stages
    assert all(check.ok for check in verify(plan))
    assert plan.certificate.gap < 1e-6
    assert plan.certificate.value > planned(UNCONSTRAINED).certificate.value
    assert parse_plan(plan_json(plan), "") == plan


def test_layers_in_no_stage_are_planned():
    plan = planned(Constraints(stages=(stage("c", 0, 2),)))
    assert laid(plan)[0] == ("c", 0, 2)
    assert set(plan.device_ids) - {"c"} <= {"a", "b"}
    assert all(check.ok for check in verify(plan))


def test_shares_by_hand():
    """8 KV heads and 8192 FFN columns in the ratio 3 to 1, whichever device is named first."""
    for asked in (stage("a+b", 0, 12, (3, 1)), stage("b+a", 0, 12, (1, 3))):
        split = planned(Constraints(stages=(asked,))).stages[0].split
        assert split.device_ids == ("a", "b")
        assert (split.kv_heads, split.ffn_columns) == ((6, 2), (6144, 2048))
        assert split.vocab_rows == (96192, 32064)


def test_a_pin_holds_its_layers_among_others():
    plan = planned(Constraints(pins=(Pin(device_id="c", layer_start=11, layer_stop=12),)))
    assert "c" in plan.stages[-1].split.device_ids
    used = planned(Constraints(pins=(Pin(device_id="c"),)))
    assert "c" in used.device_ids
    assert used.certificate.value <= plan.certificate.value * (1 + 1e-9)


def test_excluded_devices_stay_in_the_cluster():
    plan = planned(Constraints(excluded=("a",)))
    assert "a" not in plan.device_ids
    assert plan.cluster == replace(THREE, coordinator=plan.cluster.coordinator)
    assert all(check.ok for check in verify(plan))


def test_verify_holds_a_plan_to_its_constraints():
    plan = planned(UNCONSTRAINED)
    assert plan.device_ids == ("a", "b")
    for constraints in (
        Constraints(use_all=True),
        Constraints(excluded=("b",)),
        Constraints(groups="none"),
        Constraints(groups="even"),
        Constraints(pins=(Pin(device_id="c"),)),
        Constraints(pins=(Pin(device_id="c", layer_start=0, layer_stop=1),)),
        Constraints(stages=(stage("a", 0, 12),)),
        Constraints(stages=(stage("a+b", 0, 12, (1, 3)),)),
    ):
        failed = [check.name for check in verify(replace(plan, constraints=constraints)) if not check.ok]
        assert failed == ["constraints"], constraints


def test_a_bound_without_the_constraints_is_no_claim_beyond_them():
    """What was proven of fewer divisions is not true of all: verify bounds those that keep the constraints."""
    held = planned(Constraints(stages=(stage("c", 0, 12),)))
    (failed,) = [check.name for check in verify(replace(held, constraints=UNCONSTRAINED)) if not check.ok]
    assert failed == "lower bound"


def test_what_constraints_cost():
    """Against plans made without them."""
    asked = Constraints(stages=(stage("c", 0, 2),), excluded=("b",))
    plan, cost = planned(asked), cost_of_constraints(planned(asked))
    free = planned(UNCONSTRAINED).certificate.value
    assert cost.loss == pytest.approx(plan.certificate.value / free - 1)
    assert [one.typed for one in cost.dropped] == ["--exclude b", "--stage c=0-1"]
    for one, rest in zip(cost.dropped, (replace(asked, excluded=()), replace(asked, stages=())), strict=True):
        assert one.loss == pytest.approx(plan.certificate.value / planned(rest).certificate.value - 1)
    assert cost_of_constraints(planned(UNCONSTRAINED)) is None


def test_twenty_devices_by_hand():
    """Each state of a full division follows from its layer, so its devices are not too many ways."""
    devices = [cpu(f"d{number}", 6 + number / 8, host=f"h{number % 2}") for number in range(20)]
    stages = tuple(stage(f"d{number}", number, number + 1) for number in range(20))
    plan = make_plan(llama(20), cluster(devices), workload(), FP32, Constraints(stages=stages))
    assert laid(plan) == [(f"d{number}", number, number + 1) for number in range(20)]
    with pytest.raises(UsageError, match="20 devices are too many ways for --pin and --stage"):
        make_plan(llama(20), cluster(devices), workload(), FP32, Constraints(stages=stages[:1]))


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (Constraints(excluded=("d",)), "unknown device 'd'; there is a, b, c"),
        (Constraints(excluded=("a", "b", "c")), "all 3 devices are excluded"),
        (Constraints(excluded=("a",), pins=(Pin(device_id="a"),)), "a is excluded and is to take part"),
        (Constraints(stages=(stage("a", 0, 13),)), "--stage a=0-12: the layers of llama are 0 to 11"),
        (Constraints(stages=(stage("a", 0, 3), stage("b", 2, 4))), "layer 2 is in both"),
        (Constraints(stages=(stage("a", 0, 3), stage("a", 4, 6))), "a is in both"),
        (Constraints(stages=(stage("a+c", 0, 3),)), "are on one host, these on local and far"),
        (Constraints(stages=(stage("a+a", 0, 3),)), "a device is named twice"),
        (Constraints(stages=(stage("a+b", 0, 4),), groups="none"), "does not go with one device a stage"),
        (Constraints(stages=(stage("a+b", 0, 4, (3, 1)),), groups="even"), "does not go with equal shares"),
        (Constraints(stages=(stage("a", 0, 4), stage("b", 4, 8), stage("c", 9, 12))), "layers 8–8 are in no"),
        (Constraints(stages=(stage("a", 0, 12),), use_all=True), "leave none to b, c"),
        (
            Constraints(stages=(stage("a", 0, 4),), pins=(Pin(device_id="b", layer_start=3, layer_stop=5),)),
            "--pin b=3-4 does not go with --stage a=0-3",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused(asked, text):
    with pytest.raises(UsageError) as error:
        planned(asked)
    assert text in str(error.value)


def test_a_stage_that_does_not_fit_says_by_how_much():
    """And what to drop, which was tried."""
    small, asked = cluster([cpu("a", 1), cpu("b", 6)]), Constraints(stages=(stage("a", 0, 11),))
    with pytest.raises(InfeasibleError) as error:
        planned(asked, small, streaming=False)
    # 11 layers of 2048 · (8 · 64 · 10 + 3 · 8192 + 2) elements of 4 bytes are 2.49 GiB, the embedding is 0.98 GiB, keys
    # and values of 2048 tokens are 0.09 GiB, and some workspace.
    assert "a needs 3.6 GiB in --stage a=0-10 and has 1.0 GiB, it has room for none" in str(error.value)
    assert "without --stage a=0-10 a plan exists" in str(error.value)
    assert fits(llama(), small, workload(), FP32, streaming=False)
    both = Constraints(stages=(*asked.stages, stage("b", 11, 12)))
    with pytest.raises(InfeasibleError, match="with none of them a plan exists"):
        planned(both, small, streaming=False)


def test_where_it_is_not_the_constraints():
    with pytest.raises(InfeasibleError, match=r"llama needs .* undivided"):
        planned(Constraints(excluded=("a",)), cluster([cpu("a", 0.1), cpu("b", 0.1)]), streaming=False)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a=0-3", stage("a", 0, 4)),
        ("a = 0 – 3", stage("a", 0, 4)),
        ("far/c=7", stage("c", 7, 8)),
        ("a+b=4-11", stage("a+b", 4, 12)),
        ("a+b:3:1=4-11", stage("a+b", 4, 12, (3, 1))),
    ],
)
def test_stages_as_they_are_typed(text, meant):
    read = read_constraints(llama(), THREE, stages=[text], pins=None, excluded=None, use_all=None)
    assert read.stages == (meant,)
    assert read.stages[0].typed.split()[1] in (text, "a=0-3", "c=7")


@pytest.mark.parametrize(
    ("text", "layers"), [("c", (0, 0)), ("c=embedding", (0, 1)), ("c=head", (11, 12)), ("c=2-3", (2, 4))]
)
def test_pins_as_they_are_typed(text, layers):
    read = read_constraints(llama(), THREE, stages=None, pins=[text], excluded=["far"], use_all=True)
    assert read.pins == (Pin(device_id="c", layer_start=layers[0], layer_stop=layers[1]),)
    assert (read.excluded, read.use_all) == (("c",), True)


DEVICES = ["--devices", "desk=cpu:40MiB, laptop=cpu:40MiB@0.5", "--no-calibration"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--stage", "desk"], 2, "--stage 'desk': write it like desk=0-11"),
        (["--stage", "desk=3-1"], 2, "layer 1 comes before 3"),
        (["--stage", "desk+laptop:1=0-7"], 2, "1 shares for 2 devices"),
        (["--stage", "dsk=0-7"], 2, "--stage: unknown device 'dsk'; did you mean desk?"),
        (["--pin", "desk=haed"], 2, "did you mean head?"),
        (["--exclude", "labtop"], 2, "--exclude: unknown device 'labtop'; did you mean laptop?"),
        (["--reserve", "desk"], 2, "--reserve 'desk'"),
        (["--reserve", "laptop=1GiB"], 2, "1.0 GiB cannot be kept unused on laptop: it has 40.0 MiB"),
        (["--reserve", "desk=39MiB", "--stage", "desk=0-7"], 3, "desk needs"),
        (["--pin", "desk", "--replicas", "2", "--concurrency", "2"], 2, "--pin and --stage lay out one"),
        (["--use-all", "--objective", "fewest-devices"], 2, "give one of them"),
    ],
)
def test_mistakes_on_the_command_line(arguments, code, text, capsys):
    assert exit_code(["plan", "demo", *DEVICES, *arguments]) == code
    assert text in capsys.readouterr().err


def test_the_command_line_plans_by_hand(capsys):
    assert (
        exit_code(["plan", "demo", *DEVICES, "--stage", "laptop=0-2", "--reserve", "desk=4MiB", "--json"])
        == 0
    )
    made = json.loads(capsys.readouterr().out)
    assert made["constraints"]["stages"][0]["device_ids"] == ["laptop"]
    assert [stage["layer_stop"] for stage in made["stages"]] == [3, 8]
    assert made["memory"]["desk"]["reserved_bytes"] == 4 * 2**20
    assert exit_code(["plan", "demo", *DEVICES, "--stage", "laptop=0-2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "a stage of layers 0–2 on laptop: this costs" in shown


def test_reserved_memory_is_left_free():
    asked = THREE.with_reserve("a", 2 * GIB)
    plan = planned(UNCONSTRAINED, asked)
    assert plan.memory["a"].reserved_bytes == 2 * GIB
    assert plan.memory["a"].total_bytes <= 6 * GIB
