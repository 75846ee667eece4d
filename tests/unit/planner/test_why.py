from dataclasses import replace
from itertools import permutations, product

import pytest
from planned import cluster, cpu, llama, workload

from apportion.planner.baselines.stages import pipeline
from apportion.planner.build import make_plan
from apportion.planner.explain.forced import faster
from apportion.planner.explain.why import bottleneck_stage, explain, full_devices, links_in_use
from apportion.planner.problem import alternatives, plan_problem
from apportion.planner.weigh import weigh
from apportion.types.constraints import Constraints
from apportion.types.errors import InfeasibleError

PAIR = [cpu("fast", 20, 1.0, host="x"), cpu("slow", 20, 0.25, host="y")]


def planned(devices, demand=None, *, joined=True):
    return make_plan(llama(), cluster(devices, joined=joined), demand or workload(), ("fp32",))


def relief(plan, change):
    return next(one for one in explain(plan).reliefs if one.change == change)


def test_a_faster_device_takes_less_of_everything():
    device = faster(cpu("a", 1), 2)
    assert (device.mem_bytes_per_s, device.flops_per_s["fp32"]) == (32e9, 150e9)
    assert (device.layer_overhead_s, device.step_overhead_s) == (1.5e-4, 1.5e-4)
    assert device.memory_bytes == cpu("a", 1).memory_bytes


def test_one_device_a_quarter_faster_is_a_quarter_better():
    plan = planned([cpu("only", 20)])
    # but for the coordinator's messages to it, 30 µs each way
    assert relief(plan, "only 25% faster").gain == pytest.approx(0.25, abs=2e-3)
    assert explain(plan).losses[0].division is None


def test_gains_are_those_of_the_plan_for_the_changed_cluster():
    plan = planned([cpu("a", 3, 0.5, host="x"), cpu("b", 3, 1.0, host="y")], workload("throughput", 4))
    slowest = bottleneck_stage(plan).split.device_ids[0]
    devices = [faster(device, 1.25) if device.id == slowest else device for device in plan.cluster.devices]
    after = make_plan(plan.model, replace(plan.cluster, devices=tuple(devices)), plan.workload, ("fp32",))
    gain = plan.certificate.value / after.certificate.value - 1
    assert relief(plan, f"{slowest} 25% faster").gain == pytest.approx(gain)
    assert gain > 0


def test_losing_a_device_is_planning_without_it():
    devices = [cpu("a", 3, 0.5, host="x"), cpu("b", 3, 1.0, host="y"), cpu("c", 3, 0.75, host="z")]
    plan = planned(devices, workload("throughput", 4))
    losses = {part.device_id: part.division for part in explain(plan).losses}
    assert set(losses) == set(plan.device_ids)
    for name, division in losses.items():
        without = planned([device for device in devices if device.id != name], plan.workload)
        assert division.value == pytest.approx(without.certificate.value)
        assert division.value > plan.certificate.value


def test_a_device_left_out_would_make_it_slower():
    plan = planned(PAIR)
    assert plan.device_ids == ("fast",)
    (left_out,) = explain(plan).left_out
    assert left_out.device_id == "slow"
    problem = plan_problem(plan)
    every = [
        weigh(one, pipeline(one, zip(order, (count, 12 - count), strict=True))).value
        for one in alternatives(problem)
        for order, count in product(permutations(plan.cluster.devices), range(1, 12))
    ]
    assert left_out.division.value == pytest.approx(min(every))
    assert left_out.division.value > plan.certificate.value


def test_a_device_that_cannot_be_reached_works_by_itself():
    """With the coordinator on its own host; whichever is named first, the better one is planned."""
    for devices in (PAIR, PAIR[::-1]):
        plan = planned(devices, joined=False)
        assert (plan.device_ids, plan.cluster.coordinator) == (("fast",), "x")
        (left_out,) = explain(plan).left_out
        assert left_out.division.device_ids == {"slow"}
        assert left_out.division.value > plan.certificate.value


def test_what_an_excluded_device_would_add():
    """As though it were not excluded; the others are."""
    devices = [*PAIR, cpu("third", 20, 0.1, host="y")]
    asked = Constraints(excluded=("fast", "third"))
    plan = make_plan(llama(), cluster(devices), workload(), ("fp32",), asked)
    adds = {part.device_id: part.division for part in explain(plan).left_out}
    assert adds["fast"].device_ids == {"fast"}
    assert adds["third"].device_ids == {"slow", "third"}
    assert [part.division for part in explain(plan).losses] == [None]


def test_links_in_use():
    one = planned(PAIR)
    assert links_in_use(one) == ()
    away = planned([cpu("slow", 0.5, 0.1, host="x"), cpu("fast", 20, host="y")])
    assert links_in_use(away) == ()  # the coordinator is where the stage is
    apart = planned([cpu("a", 3, host="x"), cpu("b", 3, host="y")])
    assert [(link.src, link.dst) for link in links_in_use(apart)] == [("x", "y")]
    group = planned([cpu("a", 20), cpu("b", 20)])
    assert len(group.stages) == 1
    assert [(link.src, link.dst) for link in links_in_use(group)] == [("local", "local")]


def test_a_faster_link_is_worth_what_it_saves():
    """Two stages, the coordinator with the first: hidden states go there, a token comes back, in 127 decode steps and
    one of the prompt's 32 chunks, the others of which wait for the slower stage; a token is drawn in the last alone."""
    plan = planned([cpu("a", 3, host="x"), cpu("b", 3, host="y")])
    assert (len(plan.stages), plan.chunk_tokens) == (2, 16)
    latency_s, bytes_per_s, hidden_bytes = 3e-4, 1.25e8, 2048 * 4
    there = (127 + 16) * hidden_bytes / bytes_per_s
    seconds = 2 * (127 + 1) * latency_s + there + (127 * 4 + 4 / 32) / bytes_per_s
    gain = relief(plan, "link x–y 10× faster").gain
    expected = 0.9 * seconds / (plan.certificate.value - 0.9 * seconds)
    assert gain == pytest.approx(expected, rel=1e-3)


def test_a_device_is_full_without_room_for_one_more_layer():
    roomy = planned(PAIR)
    assert full_devices(roomy) == ()
    tight_bytes = roomy.memory["fast"].total_bytes
    tight = planned([replace(PAIR[0], memory_bytes=tight_bytes), PAIR[1]])
    assert full_devices(tight) == ("fast",)
    alone = planned(PAIR[:1])
    smaller_chunk = planned([replace(PAIR[0], memory_bytes=alone.memory["fast"].total_bytes - 1)])
    assert smaller_chunk.chunk_tokens < 256
    assert full_devices(smaller_chunk) == ("fast",)


def test_more_memory_helps_where_it_binds():
    tight = planned([cpu("fast", 2.5, 1.0, host="x"), cpu("slow", 20, 0.25, host="y")])
    assert set(tight.device_ids) == {"fast", "slow"}
    assert relief(tight, "fast 25% more memory").gain > 0.05


def test_weighing_refuses_what_does_not_fit():
    problem = plan_problem(planned(PAIR))
    tiny = replace(problem, cluster=cluster([cpu("fast", 0.1, host="x")]))
    with pytest.raises(InfeasibleError, match="fast needs"):
        weigh(tiny, pipeline(tiny, [(tiny.cluster.devices[0], 12)]))
