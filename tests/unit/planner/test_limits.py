"""What limits a plan, and what would help it, by arithmetic on its own stages."""

from dataclasses import replace

import pytest
from planned import cluster, cpu, llama, workload

from apportion.cost.estimate import plan_estimate
from apportion.planner.build import make_plan
from apportion.planner.explain.limits import hints, limits
from apportion.planner.explain.why import links_in_use

PAIR = [cpu("a", 3, 1.0, host="x"), cpu("b", 3, 1.0, host="y")]


def planned(*devices, demand=None, formats=("fp32",)):
    return make_plan(llama(), cluster(devices), demand or workload(), formats)


def parts(plan):
    return {limit.work: limit.part for limit in limits(plan)}


def test_decode_of_one_request_is_limited_by_reading():
    """A step of one token reads every weight of the layers and of the head once: at 16 GB/s 4 bytes take 0.25 ns, and
    two operations at 75 GFLOP/s 0.027 ns, which hide behind it and show where reading takes no time."""
    plan = planned(cpu("only", 20), demand=replace(workload(), prompt_tokens=1, output_tokens=64))
    first = limits(plan)[0]
    assert first.work == "reading weights and KV cache from memory"
    weights = 12 * (8 * 2048 * 64 * 10 + 8192 * 3 * 2048) + 128256 * 2048
    gone_s = 64 * weights * (4 / 16e9 - 2 / 75e9)
    assert first.part == pytest.approx(gone_s / plan.certificate.value, rel=0.02)
    assert first.device_ids == ("only",)
    assert first.stage_part == first.part


def test_a_long_prompt_is_limited_by_arithmetic():
    plan = planned(cpu("only", 20), demand=replace(workload(), prompt_tokens=1900, output_tokens=2))
    assert limits(plan)[0].work == "arithmetic"
    assert limits(plan)[0].part > 0.9


def test_slow_steps_and_slow_links_are_named():
    slow = replace(cpu("only", 20), step_overhead_s=3.0, layer_overhead_s=0.0)
    plan = planned(slow)
    steps = 127 + plan.workload.prompt_tokens // plan.chunk_tokens
    assert limits(plan)[0].work == "the fixed time of every layer and step"
    assert limits(plan)[0].part == pytest.approx(steps * 3.0 / plan.certificate.value)
    apart = cluster(PAIR)
    links = tuple(replace(link, latency_s=0.5) if link.src != link.dst else link for link in apart.links)
    plan = make_plan(llama(), replace(apart, links=links), workload(), ("fp32",))
    first = limits(plan)[0]
    assert (first.work, first.device_ids) == ("messages between devices", ())


def test_the_stage_with_most_of_it_is_named():
    plan = planned(cpu("fast", 2.2, 1.0, host="x"), cpu("slow", 20, 0.1, host="y"))
    assert len(plan.stages) == 2
    assert limits(plan)[0].device_ids == ("slow",)
    assert 0 < limits(plan)[0].stage_part < limits(plan)[0].part


def test_parts_are_of_the_objective():
    for demand in (workload(), workload("throughput", 4)):
        plan = planned(*PAIR, demand=demand)
        assert all(0 <= part <= 1 for part in parts(plan).values())


def test_narrower_weights_help_as_much_as_they_are_said_to():
    """fp32 to int8 are 4 bytes to 1 and a scale per row: nearly four times as fast where reading is all there is."""
    device = replace(
        cpu("only", 20),
        layer_overhead_s=0.0,
        step_overhead_s=0.0,
        flops_per_s={"fp32": 1e15, "int8": 1e15},
    )
    plan = planned(device, demand=replace(workload(), prompt_tokens=1, output_tokens=64))
    (hint,) = hints(plan)
    assert hint.change == "--weights int8"
    assert 3.5 < hint.factor < 4.0
    after = make_plan(llama(), plan.cluster, plan.workload, ("int8",))
    assert plan.certificate.value / after.certificate.value == pytest.approx(hint.factor, rel=1e-3)


def test_a_hint_promises_no_more_than_planning_again_gives():
    plan = planned(*PAIR, cpu("c", 3, 0.5, host="z"))
    (link, *_) = (link for link in links_in_use(plan) if link.src != link.dst)
    found = {hint.change: hint.factor for hint in hints(plan)}
    name = f"a link {link.src}–{link.dst} 10× as fast"
    for change, factor in found.items():
        if change == name:
            better = replace(link, latency_s=link.latency_s / 10, bytes_per_s=link.bytes_per_s * 10)
            links = tuple(better if one == link else one for one in plan.cluster.links)
            after = make_plan(plan.model, replace(plan.cluster, links=links), plan.workload, ("fp32",))
            assert plan.certificate.value / after.certificate.value >= factor - 1e-9


def test_memory_for_streamed_layers_is_a_hint():
    small = replace(cpu("small", 2.0), stream_bytes_per_s=2e9, host_memory_bytes=2**36)
    plan = planned(small)
    assert plan.stages[0].streamed_layers
    hint = next(hint for hint in hints(plan) if "more memory" in hint.change)
    held = replace(plan, stages=(replace(plan.stages[0], streamed_layers=()),))
    value = plan_estimate(held)
    total_s = value.ttft_s + 127 * value.tpot_s
    assert hint.factor == pytest.approx(plan.certificate.value / total_s, rel=1e-3)
    assert hint.change.endswith("more memory on small")
    assert limits(plan)[0].work.startswith("bringing layers that fit nowhere")


def test_weights_as_stored_have_no_narrower_ones():
    plan = planned(replace(cpu("only", 20), flops_per_s={"int8": 75e9}), formats=("int8",))
    assert not hints(plan)  # int4 is planned for other engines, and this device is one of this machine
    card = replace(cpu("only", 20), source="datasheet", flops_per_s={"fp16": 1e12, "int8": 1e12})
    plan = planned(card, formats=("int8",))
    assert [hint.change for hint in hints(plan)] == ["--weights int4"]
