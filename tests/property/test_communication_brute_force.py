"""The least communication under balance against every division there is, written without the planner: all orders,
groups, ranges and weight formats, and of each stage all shares, of which it has the fastest."""

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from math import inf, isclose

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from property.test_planner_brute_force import BruteForce, compositions, problems

from apportion.cost.estimate import (
    Steps,
    communication,
    entry_timing,
    exit_timing,
    hop_timing,
    stage_timing,
    whole_step_s,
)
from apportion.cost.group_step import group_exchange_s
from apportion.cost.roofline import decode_step
from apportion.cost.shard import stage_shards
from apportion.cost.workspace import GPU_RUNTIME_BYTES
from apportion.planner.communication import bound
from apportion.planner.communication.find import least_communication, prove_communication
from apportion.planner.communication.tables import LinkTables
from apportion.planner.problem import Problem
from apportion.planner.stages import options
from apportion.planner.stages.groups import possible_groups
from apportion.types.constraints import Constraints
from apportion.types.errors import InfeasibleError
from apportion.types.workload import BalanceLimit

TOLERANCE = 1e-9
PROVEN = 2e-6
"""HiGHS's own tolerance, twice."""


class EveryDivision:
    def __init__(self, problem: Problem):
        self.problem, self.model, self.cluster = problem, problem.model, problem.cluster
        self.brute = BruteForce(problem, 1)
        workload = problem.workload
        self.step = decode_step(workload.concurrency, workload.prompt_tokens, workload.output_tokens)
        self.steps = Steps(prefill=(), decode=self.step)
        self.known: dict[object, list[tuple[float, float]]] = {}

    def all(self):
        """(communication, times of the stages, devices in use)"""
        yield from self.extend(0, frozenset(), self.brute.home, 0.0, ())

    def extend(self, start, used, host, links_s, times_s):
        if start == self.model.num_layers:
            link = self.brute.link(host, self.brute.home)
            if link:
                yield links_s + exit_timing(link, self.steps).decode_s, times_s, used
            return
        for group in self.brute.groups(used):
            link = self.brute.link(host, group[0].host)
            if link is None:
                continue
            if start == 0:
                hop = entry_timing(link, len(group), self.steps)
            else:
                hop = hop_timing(self.model, link, len(group), self.steps, self.problem.activation_format)
            after = used | {device.id for device in group}
            for stop in range(start + 1, self.model.num_layers + 1):
                for step_s, exchange_s in self.options(group, start, stop):
                    carried = links_s + hop.decode_s + exchange_s
                    yield from self.extend(stop, after, group[0].host, carried, (*times_s, step_s))

    def options(self, group, start, stop):
        """(step, exchange) of the fastest shares in every weight format."""
        ends = (start == 0, stop == self.model.num_layers)
        layers = frozenset(Counter(self.model.layers[start:stop]).items())
        key = (tuple(device.id for device in group), layers, ends)
        if key not in self.known:
            found = [self.fastest(group, start, stop, name) for name in self.problem.weight_formats]
            self.known[key] = [one for one in found if one is not None]
        return self.known[key]

    def fastest(self, group, start, stop, weight_format):
        if not all(device.rate(weight_format) for device in group):
            return None
        stages = (
            self.brute.stage(group, start, stop, heads, columns, weight_format)
            for heads, columns in product(
                compositions(self.model.kv_heads, len(group)),
                compositions(self.model.ffn_columns, len(group)),
            )
        )
        return min((self.costs(stage, group) for stage in stages if self.brute.fits(stage)), default=None)

    def costs(self, stage, group):
        link = self.brute.link(group[0].host, group[0].host)
        exchange_s = group_exchange_s(self.model, stage_shards(self.model, stage), link, self.step)
        return stage_timing(self.model, self.cluster, stage, self.steps).decode_s, exchange_s


def epsilon(times_s, in_seconds):
    mean_s = sum(times_s) / len(times_s)
    return max(abs(seconds - mean_s) for seconds in times_s) / (1 if in_seconds else mean_s)


@st.composite
def communication_problems(draw, **sizes):
    """Of two devices and more, two in three with less memory, or with all devices in use: so that there are stages."""
    problem = draw(problems(**sizes))
    cluster = problem.cluster
    assume(len(cluster.devices) > 1 and problem.model.num_layers > 1)
    part = draw(st.sampled_from([1.0, 0.6, 0.4]))
    devices = tuple(
        replace(
            device,
            memory_bytes=GPU_RUNTIME_BYTES + round(part * (device.memory_bytes - GPU_RUNTIME_BYTES)),
        )
        for device in cluster.devices
    )
    return replace(
        problem,
        cluster=replace(cluster, devices=devices),
        workload=replace(problem.workload, objective="communication"),
        constraints=Constraints(use_all=draw(st.sampled_from([True, True, False]))),
    )


LIMITS = st.tuples(st.sampled_from([None, 0.0, 0.02, 0.1, 0.3, 0.7]), st.booleans())
"""Which part of the divisions keep the balance at least, and whether ε is in seconds."""


def between(epsilons, part):
    """A number that none is near, above this part of them; a little is taken off the least where that is 0.0."""
    steps = sorted(set(epsilons))
    gaps = [(a, b) for a, b in pairwise([*steps, 2 * steps[-1] + 1e-3]) if b > a + 1e-6 * steps[-1]]
    if part == 0.0 and steps[0] > 0:
        return 0.9 * steps[0]
    low, high = gaps[int(part * len(gaps))]
    return (low + high) / 2


def check(problem, part, in_seconds):
    everything = {device.id for device in problem.cluster.devices}
    divisions = [
        (links_s, epsilon(times_s, in_seconds))
        for links_s, times_s, used in EveryDivision(problem).all()
        if not problem.constraints.use_all or used == everything
    ]
    if not divisions:
        assert least_communication([problem]) is None
        return
    limit = inf if part is None else between([reached for _, reached in divisions], part)
    if part is not None:
        balance = BalanceLimit(seconds=limit) if in_seconds else BalanceLimit(of_mean=limit)
        problem = replace(problem, workload=replace(problem.workload, balance=balance))
    best = min((links_s for links_s, reached in divisions if reached < limit), default=inf)
    if best == inf:
        check_smallest(problem, min(reached for _, reached in divisions), in_seconds)
        return
    found = least_communication([problem])
    assert found is not None
    reached = communication(problem.model, problem.cluster, problem.workload, found.stages).total_s
    assert isclose(reached, best, rel_tol=TOLERANCE)
    assert found.value == reached
    times_s = whole_step_s(problem.model, problem.cluster, problem.workload, found.stages)
    assert epsilon(times_s, in_seconds) < limit
    assert not problem.constraints.use_all or used(found) == everything
    proven = prove_communication(found.problem, reached)
    assert proven.seconds <= best * (1 + TOLERANCE)
    if len(set(problem.model.layers)) == 1:
        assert proven.seconds >= best * (1 - PROVEN)
    check_sound(problem, best)


def used(found):
    return {device_id for stage in found.stages for device_id in stage.split.device_ids}


def check_smallest(problem, smallest, in_seconds):
    """The error asks for no less than what can be kept, and little more."""
    with pytest.raises(InfeasibleError, match="ask for --balance") as error:
        least_communication([problem])
    number, unit = re.search(r"--balance ([0-9.e+-]+)(%|ms)", str(error.value)).groups()
    assert unit == ("ms" if in_seconds else "%")
    assert smallest <= float(number) / (1e3 if in_seconds else 100) <= 1.03 * smallest


def check_sound(problem, best):
    """Given a division half as bad again, the bound stays below the best; also where shares are not numbered."""
    for numbered in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bound, "MAX_PROGRAMS", 12)
            if not numbered:
                patch.setattr(options, "MAX_SHARES", 1)
            tables = LinkTables(problem, possible_groups(problem))
            proven = bound.CommunicationBound(tables, 1.5 * best).prove(problem.workload.balance)
            assert proven.seconds <= best * (1 + TOLERANCE)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(communication_problems(), LIMITS)
def test_least_communication_equals_brute_force(problem, limit):
    check(problem, *limit)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(communication_problems(max_devices=4, max_layers=6, hosts=("a", "b", "c", "d")), LIMITS)
def test_pipelines_of_least_communication_equal_brute_force(problem, limit):
    check(problem, *limit)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(communication_problems(), LIMITS)
def test_least_communication_at_length(problem, limit):
    check(problem, *limit)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(communication_problems(max_devices=4, max_layers=8, hosts=("a", "b", "c", "d")), LIMITS)
def test_pipelines_of_least_communication_at_length(problem, limit):
    check(problem, *limit)
