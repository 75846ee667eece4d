"""Limits and numbers of devices against every division there is, with the statements written out once more."""

from dataclasses import replace
from math import inf, isclose

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.test_planner_brute_force import BruteForce, problems

from apportion.cost.estimate import exit_timing
from apportion.planner.bounds.bound import certify
from apportion.planner.demand import CLOSE, find_demanded
from apportion.planner.divide import search
from apportion.planner.finder import Finder
from apportion.planner.problem import alternatives
from apportion.planner.search.division import Search, StageKinds, possible_groups
from apportion.planner.search.limits import WithinLimits
from apportion.planner.stages.formats import group_problems
from apportion.planner.stages.shares import GroupMemory

FACTORS = st.sampled_from([None, 0.99, 1.0, 1.01, 1.05, 1.2, 1.5])


class Everything(BruteForce):
    def divisions(self, start, used, host, timings):
        """(devices in use, times of all stages and links) of every division."""
        if start == self.model.num_layers:
            link = self.link(host, self.home)
            if link:
                yield len(used), [*timings, exit_timing(link, self.steps)]
            return
        for stop, after, next_host, hop, timing in self.stages_from(start, used, host):
            yield from self.divisions(stop, after, next_host, [*timings, hop, timing])


def everything(problem):
    """(devices, value, TTFT, TPOT) of every division and number of microbatches."""
    for microbatches in numbers(problem):
        yield from of_microbatches(problem, microbatches)


def numbers(problem):
    return range(1, min(problem.workload.concurrency, 2 * len(problem.cluster.devices)) + 1)


def of_microbatches(problem, microbatches):
    sequences = problem.workload.concurrency
    chunks = -(-problem.workload.prompt_tokens // problem.capacity.chunk_tokens)
    brute = Everything(problem, microbatches)
    for devices, times in brute.divisions(0, frozenset(), brute.home, []):
        prefill, decode = [t.prefill_s / chunks for t in times], [t.decode_s for t in times]
        # Requests are prefilled in order: the r-th's last chunk follows r·chunks − 1 others through the slowest.
        ttft_s = sum(
            sum(prefill) + (number * chunks - 1) * max(prefill) for number in range(1, sequences + 1)
        )
        tpot_s = max(microbatches * max(decode), sum(decode))
        yield devices, brute.goal.value(times), ttft_s / sequences, tpot_s


@st.composite
def limited_problems(draw, **sizes):
    problem = draw(problems(**sizes))
    problem = replace(problem, workload=replace(problem.workload, objective="throughput"))
    known = list(everything(problem))
    if not known:
        return problem, known, None, None
    # Just above the least there is, where the fastest breaks a limit and others do not.
    ttft, tpot = draw(FACTORS), draw(FACTORS)
    limits = {
        "ttft_limit_s": ttft and ttft * min(one[2] for one in known),
        "tpot_limit_s": tpot and tpot * min(one[3] for one in known),
    }
    return replace(problem, workload=replace(problem.workload, **limits)), known, *limits.values()


def check(problem, divisions):
    best = min((value for _, value, *_ in divisions), default=inf)
    found = search(problem)
    assert (found is None) == (best == inf)
    if found is not None:
        assert isclose(found.value, best, rel_tol=1e-9)


def kept(divisions, ttft_limit_s, tpot_limit_s):
    close = 1 + 1e-9
    return [
        one
        for one in divisions
        if (ttft_limit_s is None or one[2] <= ttft_limit_s * close)
        and (tpot_limit_s is None or one[3] <= tpot_limit_s * close)
    ]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(limited_problems(max_devices=3, max_layers=4))
def test_limits_equal_brute_force(asked):
    problem, divisions, *limits = asked
    check(problem, kept(divisions, *limits))


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(limited_problems(max_devices=3, max_layers=4), st.data())
def test_every_number_of_microbatches_equals_brute_force(asked, data):
    """Also where the best division without limits would keep them."""
    problem, *_ = asked
    microbatches = data.draw(st.sampled_from(numbers(problem)))
    divisions = list(of_microbatches(problem, microbatches))
    if divisions:
        passing = data.draw(st.sampled_from(divisions))
        limits = [figure * data.draw(st.sampled_from([1.0, 1.3])) for figure in passing[2:]]
        workload = replace(problem.workload, ttft_limit_s=limits[0], tpot_limit_s=limits[1])
        problem = replace(problem, workload=workload)
        best = min(value for _, value, *_ in kept(divisions, *limits))
        searched = make_search(problem, microbatches)
        division = WithinLimits(searched, microbatches, inf).best()
        assert division is not None
        assert isclose(searched.goal.combine(division.total, division.maximum), best, rel_tol=1e-9)


def make_search(problem, microbatches):
    kinds, groups = StageKinds(problem.model), possible_groups(problem)
    memories = [
        [GroupMemory(one, group.devices, kinds) for one in group_problems(problem, group.devices, kinds)]
        for group in groups
    ]
    return Search(problem, microbatches, groups, memories, kinds)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(limited_problems(max_devices=3, max_layers=4), st.integers(1, 2))
def test_fewer_devices_equal_brute_force(asked, most):
    problem, divisions, *limits = asked
    few = [one for one in kept(divisions, *limits) if one[0] <= most]
    check(replace(problem, max_devices=most), few)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(limited_problems(max_devices=2, max_layers=4), st.integers(17, 40))
def test_no_number_of_sequences_is_better_than_the_one_found(asked, most):
    """Of those that are not tried the bound says so."""
    problem, *_ = asked
    workload = problem.workload
    if not workload.limited:
        workload = replace(workload, ttft_limit_s=1.0)
    finder = Finder(problem.model, problem.cluster, problem.weight_formats, streaming=False)
    every = [finder.best(replace(workload, concurrency=number)) for number in range(1, most + 1)]
    best = min((one.value for one in every if one is not None), default=inf)
    found = find_demanded(replace(workload, concurrency=most), finder)
    assert (found is None) == (best == inf)
    if found is not None:
        assert found.value * CLOSE <= best * (1 + 1e-9)
        certificate = certify(alternatives(found.problem), found.value)
        assert certificate.lower_bound <= best * (1 + 1e-9)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(limited_problems(max_devices=4, max_layers=5), st.sampled_from([None, 1, 2, 3]))
def test_limits_and_devices_equal_brute_force_at_length(asked, most):
    problem, divisions, *limits = asked
    few = [one for one in kept(divisions, *limits) if most is None or one[0] <= most]
    check(replace(problem, max_devices=most), few)
