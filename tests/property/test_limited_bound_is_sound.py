"""No division that keeps the limits is better than the bound that knows them, nor is one that it excludes possible."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.test_limits_brute_force import kept, limited_problems, numbers, of_microbatches

from apportion.planner.bounds.bound import certify
from apportion.planner.bounds.exclusion import Exclusion
from apportion.planner.bounds.fewest import prove_fewest
from apportion.planner.bounds.limited_bound import LimitedBound
from apportion.planner.bounds.ways import Ways
from apportion.planner.stages import options
from apportion.planner.stages.groups import possible_groups
from apportion.planner.stages.kinds import StageKinds

CLOSE = 1 + 1e-9
SHARES = {"shares numbered": options.MAX_SHARES, "shares relaxed": 0}


def check_value(asked):
    """A certificate never claims more than its own plan's value, so the one given is a worse plan's."""
    problem, divisions, *limits = asked
    best = min((value for _, value, *_ in kept(divisions, *limits)), default=inf)
    if best < inf:
        certificate = certify([problem], 1.5 * best)
        assert certificate.lower_bound <= best * CLOSE, certificate


def one_way(problem, microbatches):
    sequences = problem.workload.concurrency
    return Ways(
        chunks=(problem.capacity.chunk_tokens,),
        sequences=(sequences, sequences),
        microbatches=(microbatches, microbatches),
    )


def check_devices(asked, most, slower):
    """With at most so many devices; the time per output token is that of one of the divisions, and more."""
    problem, _, *limits = asked
    kinds, groups = StageKinds(problem.model), possible_groups(problem)
    for microbatches in numbers(problem):
        divisions = kept(list(of_microbatches(problem, microbatches)), *limits)
        best = min((value for devices, value, *_ in divisions if devices <= most), default=inf)
        bound = LimitedBound(problem, one_way(problem, microbatches), groups, kinds)
        if best < inf:
            assert not bound.excluded(best * slower, most)
            assert not bound.excluded(max_devices=most)


def check_fewest(asked, number, slower):
    """With the limits alone, and with a rate that a division with the `number`-th fastest time or slower serves."""
    problem, divisions, *limits = asked
    known = sorted(kept(divisions, *limits), key=lambda one: one[1])
    if not known:
        return
    workload = replace(problem.workload, objective="fewest-devices")
    most_s = known[min(number, len(known) - 1)][1] * slower
    for rate, within in (
        (None, known),
        (1 / (workload.output_tokens * most_s), [one for one in known if one[1] <= most_s]),
    ):
        open_problem = replace(problem, workload=replace(workload, arrival_rate=rate))
        proven = prove_fewest(open_problem, len(problem.cluster.devices))
        assert proven.number <= min(devices for devices, *_ in within)


@pytest.mark.parametrize("most_shares", SHARES.values(), ids=SHARES.keys())
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=limited_problems(max_devices=3, max_layers=4))
def test_no_division_within_limits_beats_the_bound(asked, most_shares):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "MAX_SHARES", most_shares)
        check_value(asked)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(limited_problems(max_devices=3, max_layers=4), st.integers(1, 3), st.sampled_from([1.0, 1.1]))
def test_no_division_of_as_few_devices_is_excluded(asked, most, slower):
    check_devices(asked, most, slower)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(limited_problems(max_devices=3, max_layers=4), st.integers(0, 9), st.sampled_from([1.0, 1.1]))
def test_no_plan_has_fewer_devices_than_proven(asked, number, slower):
    check_fewest(asked, number, slower)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(limited_problems(max_devices=2, max_layers=4), st.data())
def test_no_division_in_one_of_many_ways_is_excluded(asked, data):
    """What excludes several chunks and numbers at once excludes each of them."""
    problem, divisions, *limits = asked
    known = kept(divisions, *limits)
    if not known:
        return
    most = problem.workload.concurrency
    chunks = data.draw(st.sampled_from([(16,), (32, 16), (64, 32, 16)]))
    ways = Ways(chunks=chunks, sequences=(data.draw(st.integers(1, most)), 2 * most), microbatches=(1, most))
    best = min(value for _, value, *_ in known)
    bound = LimitedBound(problem, ways, possible_groups(problem), StageKinds(problem.model))
    assert not bound.excluded(best)
    assert not Exclusion(problem).excludes(ways, best)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(limited_problems(max_devices=3, max_layers=5), st.integers(1, 3))
def test_limited_bounds_are_sound_at_length(asked, most):
    check_value(asked)
    check_devices(asked, most, 1.0)
    check_fewest(asked, most, 1.0)
