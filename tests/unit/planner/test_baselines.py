from dataclasses import replace
from itertools import product

import pytest
from planned import GIB, cluster, cpu, llama, workload

from apportion.cost.estimate import estimate, stage_timing
from apportion.planner.baselines.compare import RULES, baselines, baselines_with_chunk
from apportion.planner.baselines.program import layer_times
from apportion.planner.baselines.rules import (
    balanced_fill,
    compute_proportional,
    even_layers,
    even_tensor,
    greedy_fill,
    memory_proportional,
)
from apportion.planner.baselines.stages import (
    at_least_one,
    even_share,
    even_stage,
    largest_remainder,
    most_last_layers,
    most_layers,
    needed_bytes,
    pipeline,
)
from apportion.planner.problem import make_problem
from apportion.planner.weigh import weigh
from apportion.types.errors import InfeasibleError

SPEEDS = [cpu("a", 20, 0.25), cpu("b", 20, 0.5), cpu("c", 20, 0.75), cpu("d", 20, 1.0)]


def problem(devices, demand=None, *, joined=True, **model):
    return make_problem(llama(**model), cluster(devices, joined=joined), demand or workload(), ("fp32",), 256)


def layers(stages):
    return {stage.split.device_ids: stage.num_layers for stage in stages}


@pytest.mark.parametrize(
    ("total", "size", "shares"),
    [(14, 4, (3, 4, 4, 3)), (5, 3, (2, 2, 1)), (4, 4, (1, 1, 1, 1)), (7, 1, (7,))],
)
def test_an_even_share_spares_the_last(total, size, shares):
    assert even_share(total, size) == shares


def test_an_even_share_needs_a_layer_each():
    with pytest.raises(InfeasibleError, match="3 layers cannot be spread over 4"):
        even_share(3, 4)


def test_largest_remainder():
    assert largest_remainder(10, [1, 2, 3], [10, 10, 10]) == (2, 3, 5)  # 1.67, 3.33, 5
    assert largest_remainder(10, [1, 1, 2], [1, 10, 4]) == (
        1,
        5,
        4,
    )  # two at their caps, the rest to the other
    assert largest_remainder(3, [1, 1], [2, 1]) == (2, 1)
    assert at_least_one((0, 5, 1)) == (1, 4, 1)


def test_even_layers_ignores_what_devices_are():
    assert layers(even_layers(problem(SPEEDS))) == {("a",): 3, ("b",): 3, ("c",): 3, ("d",): 3}


def test_memory_proportional():
    devices = [cpu("a", 2), replace(cpu("b", 5), reserved_bytes=GIB), cpu("c", 6)]
    assert layers(memory_proportional(problem(devices))) == {("a",): 2, ("b",): 4, ("c",): 6}


def test_compute_proportional_gives_what_does_not_fit_to_the_others():
    # 12 layers by 1 : 2 : 3 : 4 are 1.2, 2.4, 3.6, 4.8
    assert layers(compute_proportional(problem(SPEEDS))) == {("a",): 1, ("b",): 2, ("c",): 4, ("d",): 5}
    small = problem([*SPEEDS[:3], cpu("d", 1.6, 1.0)])
    most = most_last_layers(small, small.cluster.devices[3])
    assert 0 < most < 5
    assert layers(compute_proportional(small))[("d",)] == most


def test_greedy_fill_fills_each_device_before_the_next():
    one = problem([cpu("a", 20), cpu("b", 20)])
    assert layers(greedy_fill(one)) == {("a",): 12}
    two = problem([cpu("a", 2), cpu("b", 20)])
    stages = greedy_fill(two)
    held = stages[0].num_layers
    device = two.cluster.devices[0]
    assert needed_bytes(two, device, 0, held) <= device.memory_bytes < needed_bytes(two, device, 0, held + 1)
    assert layers(stages) == {("a",): held, ("b",): 12 - held}
    with pytest.raises(InfeasibleError, match="full after"):
        greedy_fill(problem([cpu("a", 2), cpu("b", 1)]))


def test_balanced_fill_stops_at_an_even_share_of_the_weights():
    # A layer has 60.8 M parameters, the table 262.7 M: half of the whole and 1.25 layers are 572 M, so 5 layers fit
    # beside the table.
    assert layers(balanced_fill(problem([cpu("a", 20), cpu("b", 20)]))) == {("a",): 5, ("b",): 7}


def test_even_tensor_shares_equally_in_hosts_and_pipes_between():
    (stage,) = even_tensor(problem([cpu("a", 20, 0.25), cpu("b", 20)]))
    assert (stage.split.kv_heads, stage.split.ffn_columns) == ((4, 4), (4096, 4096))
    assert stage.split.vocab_rows == (64128, 64128)
    devices = [cpu(name, 20, host=host) for name, host in zip("abcd", "xxyy", strict=True)]
    assert layers(even_tensor(problem(devices))) == {("a", "b"): 6, ("c", "d"): 6}


def test_even_tensor_needs_heads_that_divide_and_cores_for_all():
    with pytest.raises(InfeasibleError, match="8 KV heads and 8192 FFN columns do not divide by local's 3"):
        even_tensor(problem([cpu(name, 20) for name in "abc"]))
    pair = [replace(cpu(name, 20), num_threads=2, host_cores=2) for name in "ab"]
    with pytest.raises(InfeasibleError, match="local has 2 cores for a group of 4 threads"):
        even_tensor(problem(pair))


@pytest.mark.parametrize("memories", [(20, 20, 20), (2, 2, 2), (1.6, 3, 1.5), (3, 1.6, 1.6)])
def test_layer_times_is_the_least_sum_of_decode_times(memories):
    devices = [
        cpu(name, gib, speed) for name, gib, speed in zip("abc", memories, (0.3, 1.0, 0.6), strict=True)
    ]
    asked = problem(devices)

    def decode_s(stages):
        timings = [stage_timing(asked.model, asked.cluster, stage, asked.steps(1)) for stage in stages]
        return sum(timing.decode_s for timing in timings)

    def fits(stages):
        return all(
            needed_bytes(
                asked, asked.cluster.device(stage.split.device_ids[0]), stage.layer_start, stage.layer_stop
            )
            <= asked.cluster.device(stage.split.device_ids[0]).memory_bytes
            for stage in stages
        )

    every = [
        pipeline(asked, zip(asked.cluster.devices, counts, strict=True))
        for counts in product(range(13), repeat=3)
        if sum(counts) == 12
    ]
    least = min(decode_s(stages) for stages in every if fits(stages))
    found = layer_times(asked)
    assert fits(found)
    assert decode_s(found) == pytest.approx(least)


def test_layers_from_the_front_and_from_the_back():
    asked = problem([cpu("a", 20)], num_layers=3)
    assert most_layers(asked, asked.cluster.devices[0], 0) == 3
    assert most_layers(asked, asked.cluster.devices[0], 2) == 1
    assert most_last_layers(asked, replace(asked.cluster.devices[0], memory_bytes=1)) == 0


def test_a_rule_is_weighed_with_the_cost_model():
    asked = problem(SPEEDS)
    (even, *_) = baselines_with_chunk(asked)
    assert even.division is not None
    assert even.division.estimate == estimate(
        asked.model, asked.cluster, asked.workload, even_layers(asked), chunk_tokens=256, microbatches=1
    )


def test_why_a_rule_is_not_feasible():
    small = problem([cpu("a", 20), cpu("b", 0.5)])
    with pytest.raises(InfeasibleError, match=r"b needs \d\.\d GiB, has 512\.0 MiB"):
        weigh(small, even_layers(small))
    apart = problem([cpu("a", 20, host="x"), cpu("b", 20, host="y")], joined=False)
    with pytest.raises(InfeasibleError, match="no link between x and y"):
        weigh(apart, even_layers(apart))
    alone = problem([cpu("a", 20), cpu("b", 20)])
    lonely = replace(alone, cluster=replace(alone.cluster, links=()))
    with pytest.raises(InfeasibleError, match="no link between local and local"):
        weigh(lonely, (even_stage(lonely, lonely.cluster.devices, 0, 12),))


def test_every_rule_is_there_with_its_best_chunk():
    demand = replace(workload("throughput", 4), prompt_tokens=1024, output_tokens=8)
    given = (llama(), cluster(SPEEDS), demand, ("fp32",))
    found = baselines(make_problem(*given, 16))
    assert [one.rule for one in found] == list(RULES)
    values = {
        chunk_tokens: baselines_with_chunk(make_problem(*given, chunk_tokens))[0].division.value
        for chunk_tokens in (256, 128, 64, 32, 16)
    }
    assert found[0].division.value == min(values.values())
    assert found[0].division.chunk_tokens == min(values, key=values.get)
