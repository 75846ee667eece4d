"""Rules by which the search leaves something out, or bounds much at once, each by itself."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product

from enumerated import every_chunk, every_microbatches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.test_planner_brute_force import BruteForce, compositions, problems
from property.test_planner_streaming import random_problem as streaming_problem

from apportion.cost.estimate import least_steps, objective_steps, stage_timing
from apportion.cost.memory import stages_memory
from apportion.cost.objective import goal, least_goal
from apportion.cost.shard import stage_shards
from apportion.cost.streaming import evenly_streamed
from apportion.planner.bounds.bound import all_numbers, halves
from apportion.planner.problem import Problem, useful_chunks
from apportion.planner.search.joins import Joins
from apportion.planner.stages.formats import group_problems
from apportion.planner.stages.groups import common_formats
from apportion.planner.stages.kinds import StageKinds
from apportion.planner.stages.streamed import fewest_streamed
from apportion.types.cluster import Device
from apportion.types.plan import Stage

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
EQUAL = 1 + 1e-12


def some_groups(problem: Problem) -> Iterator[tuple[Device, ...]]:
    """Single devices and pairs of one host."""
    devices = problem.cluster.devices
    yield from ((device,) for device in devices)
    if problem.model.kv_heads > 1:
        yield from (pair for pair in combinations(devices, 2) if pair[0].host == pair[1].host)


def some_stages(problem: Problem, group: tuple[Device, ...], weight_format: str) -> Iterator[Stage]:
    """The first, a middle and the last layers, and all, with all shares."""
    brute, layers = BruteForce(problem, 1), problem.model.num_layers
    ranges = {(0, 1), (layers // 2, layers // 2 + 1), (layers - 1, layers), (0, layers)}
    shares = product(
        compositions(problem.model.kv_heads, len(group)), compositions(problem.model.ffn_columns, len(group))
    )
    for (heads, columns), (start, stop) in product(shares, ranges):
        yield brute.stage(group, start, stop, heads, columns, weight_format)


@SETTINGS
@given(problems(max_devices=2, max_layers=3), st.sampled_from([5, 16, 17, 40, 300]), st.integers(64, 512))
def test_a_chunk_that_is_left_out_is_no_better(problem: Problem, prompt: int, context: int):
    """Of those that hold the whole prompt the smallest takes as long as the others, and no more memory."""
    workload = replace(problem.workload, prompt_tokens=min(prompt, context - 16), max_context_tokens=context)
    kept = useful_chunks(workload)
    for chunk in set(every_chunk(workload)) - set(kept):
        smallest = min(size for size in kept if size >= workload.prompt_tokens)
        for number in every_microbatches(workload, len(problem.cluster.devices)):
            assert objective_steps(workload, chunk, number) == objective_steps(workload, smallest, number)
            assert goal(workload, chunk, number) == goal(workload, smallest, number)
        group = problem.cluster.devices[:1]
        stage = next(some_stages(problem, group, problem.weight_formats[-1]))
        more, less = (
            stages_memory(
                problem.model, problem.cluster, [stage], replace(problem.capacity, chunk_tokens=size)
            )[group[0].id].total_bytes
            for size in (chunk, smallest)
        )
        assert less <= more


@SETTINGS
@given(problems(max_devices=3, max_layers=3))
def test_a_format_that_is_left_out_is_no_better(problem: Problem):
    """Whatever the layers, ends and shares: another takes no longer in prefill or decode, and fits where it does."""
    kinds = StageKinds(problem.model)
    steps = problem.steps(1)
    for group in some_groups(problem):
        kept = {one.formats.weights for one in group_problems(problem, group, kinds)}
        known = common_formats(problem.weight_formats, group)
        assert bool(kept) == bool(known)
        for name in set(known) - kept:
            for stage in some_stages(problem, group, name):
                if not BruteForce(problem, 1).fits(stage):
                    continue
                one = stage_timing(problem.model, problem.cluster, stage, steps)
                others = [replace(stage, weight_format=other) for other in kept]
                assert any(
                    BruteForce(problem, 1).fits(other)
                    and (timing := stage_timing(problem.model, problem.cluster, other, steps)).prefill_s
                    <= one.prefill_s * EQUAL
                    and timing.decode_s <= one.decode_s * EQUAL
                    for other in others
                )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999))
def test_more_streamed_layers_than_fit_are_no_faster(seed: int):
    """For given layers, devices and shares."""
    problem = streaming_problem(seed)
    steps, kinds = problem.steps(1), problem.weight_formats
    for group in some_groups(problem):
        if not all(device.stream_bytes_per_s and device.rate(kinds[-1]) for device in group):
            continue
        for stage in some_stages(problem, group, kinds[-1]):
            size = stage.layer_stop - stage.layer_start
            streamed = [
                replace(
                    stage,
                    streamed_layers=evenly_streamed(
                        problem.model, stage.layer_start, stage.layer_stop, count
                    ),
                )
                for count in range(size + 1)
            ]
            fitting = [count for count, one in enumerate(streamed) if BruteForce(problem, 1).fits(one)]
            if not fitting:
                continue
            times = [
                stage_timing(problem.model, problem.cluster, streamed[count], steps) for count in fitting
            ]
            assert all(times[0].prefill_s <= time.prefill_s * EQUAL for time in times)
            assert all(times[0].decode_s <= time.decode_s * EQUAL for time in times)
            members = list(zip(group, stage_shards(problem.model, stage), strict=True))
            assert sum(count for _, count in fewest_streamed(problem, members) or ()) == fitting[0]


@SETTINGS
@given(problems(max_devices=2, max_layers=3), st.integers(1, 40), st.sampled_from([1, 3, 16]), st.booleans())
def test_numbers_of_microbatches_at_once_are_below_each(
    problem: Problem, sequences: int, output: int, halved: bool
):
    """What bounds many numbers has the least weights, and steps that take the least."""
    workload = replace(problem.workload, objective="throughput", concurrency=sequences, output_tokens=output)
    problem = replace(problem, workload=workload)
    group = problem.cluster.devices[:1]
    formats = common_formats(problem.weight_formats, group)
    numbers = [part for part in all_numbers(problem) if part[0] < part[1]]
    assert [n for a, b in all_numbers(problem) for n in range(a, b + 1)] == list(
        every_microbatches(workload, len(problem.cluster.devices))
    )
    if not formats:
        return
    stages = list(some_stages(problem, group, formats[0]))
    for part in numbers:
        for few, many in halves(part) if halved else (part,):
            weights = least_goal(workload, 16, (few, many))
            steps = least_steps(workload, 16, (few, many))
            for stage in stages:
                least = stage_timing(problem.model, problem.cluster, stage, steps)
                for number in range(few, many + 1):
                    own = goal(workload, 16, number)
                    timing = stage_timing(
                        problem.model, problem.cluster, stage, objective_steps(workload, 16, number)
                    )
                    assert least.prefill_s <= timing.prefill_s * EQUAL
                    assert least.decode_s <= timing.decode_s * EQUAL
                    assert weights.path_s(least) <= own.path_s(timing) * EQUAL
                    assert weights.occupied_s(least) <= own.occupied_s(timing) * EQUAL


@SETTINGS
@given(problems(max_devices=4, max_layers=2, hosts=("a", "b", "c", "d")))
def test_any_coordinator_is_as_near_as_each(problem: Problem):
    at_any = Joins(replace(problem, any_coordinator=True), problem.steps(1))
    for one in problem.with_each_coordinator():
        joins = Joins(one, problem.steps(1))
        for device in problem.cluster.devices:
            for nearest, own in (
                (at_any.entry(device.host, 1), joins.entry(device.host, 1)),
                (at_any.exit(device.host), joins.exit(device.host)),
            ):
                if own is not None:
                    assert nearest is not None
                    assert nearest.prefill_s <= own.prefill_s
                    assert nearest.decode_s <= own.decode_s
