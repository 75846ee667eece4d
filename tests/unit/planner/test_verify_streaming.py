"""What `verify` holds against a plan that streams."""

from dataclasses import replace

import pytest
from planned import cluster, cpu, llama, workload

from apportion.planner.build import make_plan
from apportion.planner.verify.plan import verify
from apportion.types.plan import Plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    devices = [replace(cpu("a", 1.5), stream_bytes_per_s=8e9), replace(cpu("b", 1.4), stream_bytes_per_s=4e9)]
    return make_plan(llama(16), cluster(devices), workload(context=1024), ("fp32",))


def failing(plan: Plan, **changes: object) -> set[str]:
    index = next(i for i, stage in enumerate(plan.stages) if len(stage.streamed_layers) > 2)
    stages = [*plan.stages]
    stages[index] = replace(stages[index], **changes)
    return {check.name for check in verify(replace(plan, stages=tuple(stages))) if not check.ok}


def test_an_honest_plan_holds(plan: Plan):
    assert failing(plan) == set()
    assert plan.certificate.gap < 1e-6


def test_layers_are_streamed_once_in_order_and_within_the_stage(plan: Plan):
    layers = next(stage.streamed_layers for stage in plan.stages if len(stage.streamed_layers) > 2)
    for wrong in (layers[::-1], (*layers, layers[-1]), (*layers[1:], 99), (-1, *layers)):
        assert failing(plan, streamed_layers=wrong) == {"streams"}


def test_a_layer_that_is_held_after_all_changes_the_memory(plan: Plan):
    layers = next(stage.streamed_layers for stage in plan.stages if len(stage.streamed_layers) > 2)
    assert "memory" in failing(plan, streamed_layers=layers[1:])


def test_a_device_without_a_rate_does_not_stream(plan: Plan):
    devices = tuple(replace(device, stream_bytes_per_s=None) for device in plan.cluster.devices)
    changed = replace(plan, cluster=replace(plan.cluster, devices=devices))
    assert {check.name for check in verify(changed) if not check.ok} == {"streams"}
