from dataclasses import replace
from math import isclose
from time import process_time

import pytest
from planned import cluster, cpu, llama, workload

from apportion.cost.estimate import plan_objective_value
from apportion.cost.memory import plan_memory
from apportion.planner.build import make_plan
from apportion.planner.problem import make_problem
from apportion.planner.stages.axes import head_compositions, vocabulary_rows
from apportion.planner.stages.fill import fill, water_fill
from apportion.planner.stages.groups import possible_groups
from apportion.types.errors import ClusterError, InfeasibleError

FOUR = [cpu("a", 2, 0.25), cpu("b", 2.5, 0.5), cpu("c", 3, 0.75), cpu("d", 4, 1.0)]


def spread(devices):
    """One device a host: pipelines only."""
    return [replace(device, host=device.id) for device in devices]


@pytest.mark.parametrize(("objective", "concurrency"), [("latency", 1), ("throughput", 4)])
def test_four_devices_and_twelve_layers_in_a_second(objective, concurrency):
    start = process_time()
    plan = make_plan(llama(), cluster(FOUR), workload(objective, concurrency), ("fp32",))
    assert process_time() - start < 5  # of a core's time: 0.5 to 2
    assert isclose(plan.certificate.value, plan_objective_value(plan))
    assert 0 <= plan.certificate.gap < 0.01
    assert plan.memory == plan_memory(plan)
    assert all(m.total_bytes <= plan.cluster.device(name).memory_bytes for name, m in plan.memory.items())


def test_shares_follow_the_devices_speeds():
    pair = [cpu("slow", 8, 0.25), cpu("fast", 8, 1.0)]
    split = make_plan(llama(), cluster(pair), workload(), ("fp32",)).stages[0].split
    assert split.device_ids == ("fast", "slow")
    assert split.kv_heads == (6, 2) or split.kv_heads == (7, 1)
    assert isclose(split.ffn_columns[0] / split.ffn_columns[1], 4, rel_tol=0.02)
    assert isclose(split.vocab_rows[0] / split.vocab_rows[1], 4, rel_tol=0.02)


def test_memory_decides_where_speed_cannot():
    pair = [cpu("slow", 8, 0.25), cpu("fast", 1.5, 1.0)]
    plan = make_plan(llama(), cluster(pair), workload(), ("fp32",))
    assert plan.memory["fast"].total_bytes <= 1.5 * 2**30
    assert plan.memory["slow"].weights_bytes > plan.memory["fast"].weights_bytes


def test_pipelines_have_no_gap():
    plan = make_plan(llama(), cluster(spread(FOUR)), workload("throughput", 4), ("fp32",))
    assert len(plan.stages) > 1
    assert plan.certificate.gap <= 1e-9


def test_stages_are_not_joined_across_hosts_without_a_link():
    devices = spread([cpu("a", 3), cpu("b", 3)])
    with pytest.raises(InfeasibleError):
        make_plan(llama(), cluster(devices, joined=False), workload(), ("fp32",))
    assert make_plan(llama(), cluster(devices), workload(), ("fp32",)).device_ids == ("a", "b")


def test_a_slow_device_that_is_not_needed_is_left_out():
    devices = spread([cpu("fast", 8), cpu("slow", 8, 0.1)])
    assert make_plan(llama(), cluster(devices), workload(), ("fp32",)).device_ids == ("fast",)


def test_identical_devices_are_named_in_order():
    devices = [cpu(name, 1.6) for name in "abcd"]
    plan = make_plan(llama(), cluster(spread(devices)), workload(), ("fp32",))
    assert len(set(plan.device_ids)) == len(plan.device_ids)


def test_smaller_chunks_where_the_larger_do_not_fit():
    roomy = make_plan(llama(), cluster([cpu("a", 8)]), workload(), ("fp32",))
    assert roomy.chunk_tokens == 256
    tight = replace(cpu("a", 1), memory_bytes=roomy.memory["a"].total_bytes - 1)
    assert make_plan(llama(), cluster([tight]), workload(), ("fp32",)).chunk_tokens == 128


def test_balance_is_reported_with_the_smallest_reachable():
    plan = make_plan(llama(), cluster(spread(FOUR)), workload("throughput", 4), ("fp32",))
    assert 0 < plan.balance.smallest_epsilon_s <= plan.balance.epsilon_s


def test_infeasible_names_the_numbers_and_what_helps():
    with pytest.raises(InfeasibleError) as caught:
        make_plan(llama(), cluster([cpu("laptop", 1), cpu("desk", 1.5)]), workload(context=8192), ("fp32",))
    message = str(caught.value)
    assert "2 devices have 2.5 GiB" in message
    assert "the largest (desk) has 1.5 GiB" in message
    assert "--weights int8" in message  # the KV cache stays in fp32, so 16 bits would not do
    assert "\n" not in message


def test_a_suggested_context_fits():
    one = make_plan(llama(), cluster([cpu("a", 8)]), workload(context=512), ("fp32",))
    tight = replace(cpu("a", 1), memory_bytes=one.memory["a"].total_bytes)
    with pytest.raises(InfeasibleError, match="--context "):
        make_plan(llama(), cluster([tight]), workload(context=8192), ("fp32",))


def test_a_device_without_the_formats_rate_is_refused():
    with pytest.raises(ClusterError, match="device a has no flops_per_s for 'fp16'; it has bf16, fp32"):
        make_plan(llama(), cluster([cpu("a", 8)]), workload(), ("fp16",))


def test_vocabulary_rows_add_up():
    assert vocabulary_rows(10, (1, 1, 1)) == (3, 4, 3)
    assert sum(vocabulary_rows(128256, (51, 461))) == 128256


def test_head_compositions_are_all_there():
    assert head_compositions(4, 2).tolist() == [[1, 3], [2, 2], [3, 1]]
    assert head_compositions(4, 1).tolist() == [[4]]
    assert len(head_compositions(2, 3)) == 0
    assert (head_compositions(64, 4).sum(axis=1) == 64).all()


def test_many_heads_are_shared_in_granules_and_evenly():
    """128 heads among nine: in eights there are comb(15, 8) = 6435 ways, in sixteens not one, so the even one is left:
    two members have 15 heads, seven 14. 40 among eight: fives, beside the ways in fours, comb(9, 7) = 36."""
    assert sorted(head_compositions(128, 9)[0].tolist()) == [14] * 7 + [15] * 2
    assert len(head_compositions(128, 9)) == 1
    forty = head_compositions(40, 8).tolist()
    assert [5] * 8 in forty
    assert len(forty) == 36 + 1
    for heads, size in ((128, 12), (128, 24), (71, 7), (25, 5), (64, 16), (96, 7)):
        rows = head_compositions(heads, size)
        assert 0 < len(rows) <= 5001
        assert (rows.sum(axis=1) == heads).all()
        assert (rows >= 1).all()


def test_water_filling_respects_caps():
    assert water_fill((1.0, 2.0), (9, 9), 9) == (6, 3)
    assert water_fill((1.0, 2.0), (4, 9), 9) == (4, 5)
    assert water_fill((0.0, 1.0), (9, 9), 9) == (8, 1)


def test_filling_two_directions_beats_either_alone():
    rates = ((1.0, 4.0), (4.0, 1.0))
    filled = fill(rates, (10, 10), 10)
    assert filled is not None
    values = {units: max(units, 4 * (10 - units)) + max(4 * units, 10 - units) for units in range(1, 10)}
    assert filled.value == min(values.values())
    assert fill(rates, (4, 5), 10) is None


@pytest.mark.parametrize(
    ("cores", "others", "grouped"), [(2, 0, True), (2, 1, False), (3, 1, True), (None, 1, True)]
)
def test_cpus_form_groups_where_their_host_has_a_core_for_each_thread(
    cores: int | None, others: int, grouped: bool
):
    """Members wait for each other twice a layer, and would wait for the other device's turn."""
    devices = [replace(cpu(name, 20), host_cores=cores) for name in "abc"[: 2 + others]]
    asked = make_problem(llama(), cluster(devices), workload(), ("fp32",), 256)
    assert any(group.size > 1 for group in possible_groups(asked)) == grouped
