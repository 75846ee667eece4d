"""Every number of microbatches is searched and bounded.

Numbers with microbatches of equal size differ: the more there are, the fewer chunks of others come between a sequence's
own tokens (r in cost/objective.py), and the longer the stages are occupied. Neither is the better one always.
"""

from dataclasses import replace
from math import inf

import pytest
from enumerated import every_microbatches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planned import cpu
from property.test_planner_brute_force import BruteForce, problems

from apportion.cost.objective import goal
from apportion.planner.bounds.bound import certify
from apportion.planner.bounds.ways import all_ways
from apportion.planner.divide import search
from apportion.planner.problem import Problem, make_problem, microbatch_candidates
from apportion.types.cluster import Cluster, Link
from apportion.types.model import LayerSpec, ModelSpec, Parameters
from apportion.types.workload import Workload


def four_sequences() -> Problem:
    """On a device that is quick, beside one that is not; both are 100 µs from the coordinator."""
    layer = LayerSpec(
        per_kv_head=Parameters(elements=4096, rows=64, others=0),
        per_ffn_column=Parameters(elements=8192, rows=16, others=2),
        replicated=Parameters(elements=0, rows=128, others=64),
        window_tokens=None,
        num_experts=0,
        experts_per_token=0,
    )
    model = ModelSpec(
        name="tiny",
        family="llama",
        fingerprint="",
        layers=(layer, layer),
        hidden_size=64,
        q_heads=8,
        kv_heads=1,
        head_dim=16,
        ffn_columns=5,
        vocab_rows=5,
        tied_embeddings=False,
        max_context_tokens=64,
        checkpoint_format="fp32",
    )
    device = replace(
        cpu("slow", 0.04, host="a"),
        mem_bytes_per_s=1e9,
        flops_per_s={"fp32": 1e9},
        layer_overhead_s=0.0,
        step_overhead_s=0.0,
    )
    quick = replace(device, id="quick", flops_per_s={"fp16": 4e10})
    cluster = Cluster(
        devices=(device, quick), links=(Link(src="a", dst="a", latency_s=1e-4, bytes_per_s=1e9),)
    )
    asked = Workload(
        prompt_tokens=5, output_tokens=1, concurrency=4, max_context_tokens=64, objective="throughput"
    )
    return make_problem(model, cluster, asked, ("fp32", "int4"), 16)


def test_three_microbatches_beat_two_of_the_same_size():
    """Both of two sequences. A prompt takes p = 237.84 µs in all and a decode step d = 283.88 µs, links included, and
    none decode beside a chunk, as ⌊3/2(P + 1)⌋ = 0. Of one other's chunk, r = min(1, 3/(P + 1)) of it comes between:
    two microbatches take (2p + d)/4 = 189.9 µs a token, three (1.75p + d)/4 = 175.0 µs, which is 7.8 % less."""
    problem = four_sequences()
    two, three = (search(problem, (number,)) for number in (2, 3))
    assert two is not None
    assert three is not None
    assert two.value == pytest.approx((2 * 237.84e-6 + 283.88e-6) / 4, rel=1e-4)
    assert three.value == pytest.approx((1.75 * 237.84e-6 + 283.88e-6) / 4, rel=1e-4)
    found = search(problem)
    assert found is not None
    assert (found.microbatches, found.value) == (3, three.value)
    certificate = certify([problem], two.value)  # what was once taken for the best
    assert certificate.lower_bound <= three.value
    assert certify([problem], three.value).gap < 1e-8


def test_all_numbers_are_searched_and_bounded():
    for sequences in range(1, 20):
        problem = four_sequences()
        workload = replace(problem.workload, concurrency=sequences)
        for devices in range(1, 6):
            every = every_microbatches(workload, devices)
            assert list(every) == list(microbatch_candidates(workload, devices))
            assert all_ways((16,), (sequences, sequences), devices).microbatches == (every[0], every[-1])


def test_no_number_is_always_better_than_another():
    """Why none is left out: of numbers with microbatches of the same size, the greater one has the smaller weights on
    the way through the stages, and the greater ones in occupying them."""
    workload = replace(four_sequences().workload, concurrency=12, output_tokens=16)
    for few, many in ((4, 5), (6, 7), (6, 11), (7, 8)):
        assert -(-12 // few) >= -(-12 // many)
        less, more = goal(workload, 16, few), goal(workload, 16, many)
        assert more.path_prefill < less.path_prefill
        assert more.occupied_decode > less.occupied_decode


@st.composite
def many_sequences(draw) -> Problem:
    """Links take about as long as stages, and outputs are short: then numbers of the same size are best now and then
    (one in five of those problems)."""
    problem = draw(problems(min_devices=2, max_devices=3, max_layers=2))
    latency_s = draw(st.sampled_from([1e-4, 3e-4]))
    cluster = replace(
        problem.cluster,
        devices=tuple(replace(one, memory_bytes=4 * one.memory_bytes) for one in problem.cluster.devices),
        links=tuple(replace(link, latency_s=latency_s) for link in problem.cluster.links),
    )
    asked = replace(
        problem.workload, objective="throughput", concurrency=draw(st.integers(4, 8)), output_tokens=1
    )
    return make_problem(problem.model, cluster, asked, problem.weight_formats, 16)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(many_sequences())
def test_many_sequences_equal_brute_force(problem: Problem):
    numbers = every_microbatches(problem.workload, len(problem.cluster.devices))
    best = min(BruteForce(problem, number).best() for number in numbers)
    found = search(problem)
    assert (found is None) == (best == inf)
    if found is not None:
        assert found.value == pytest.approx(best, rel=1e-9)
        assert certify([problem], 1.2 * best).lower_bound <= best * (1 + 1e-9)
