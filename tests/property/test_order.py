"""Plans do not depend on the order in which hosts and devices are named, nor on their names; a coordinator is on the
host where it is best."""

from dataclasses import replace
from math import inf, isclose
from random import Random

import pytest
from enumerated import every_chunk, every_coordinator, every_microbatches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planned import cluster, cpu, llama, workload
from property.test_planner_brute_force import BruteForce, problems

from apportion.planner.build import make_plan
from apportion.planner.explain.why import explain
from apportion.planner.problem import Problem, make_problem
from apportion.types.cluster import Cluster
from apportion.types.errors import InfeasibleError
from apportion.types.plan import Plan

CLOSE = 1e-9
BOUND_CLOSE = 1e-6
"""Of a solver's bound: it depends on the order of rows."""


def planned(problem: Problem, where: Cluster) -> Plan | None:
    try:
        return make_plan(problem.model, where, problem.workload, problem.weight_formats, streaming=False)
    except InfeasibleError:
        return None


def shuffled(where: Cluster, random: Random) -> Cluster:
    """In another order, and renamed."""
    hosts = sorted({device.host for device in where.devices})
    names = dict(
        zip(hosts, random.sample([f"host{number}" for number in range(len(hosts))], len(hosts)), strict=True)
    )
    devices = [
        replace(device, id=f"device{number}", host=names[device.host])
        for number, device in zip(random.sample(range(99), len(where.devices)), where.devices, strict=True)
    ]
    links = []
    for link in where.links:
        ends = random.sample([names[link.src], names[link.dst]], 2)
        links.append(replace(link, src=ends[0], dst=ends[1]))
    random.shuffle(devices)
    random.shuffle(links)
    return Cluster(devices=tuple(devices), links=tuple(links))


def check_order(problem: Problem, seed: int):
    one = planned(problem, problem.cluster)
    other = planned(problem, shuffled(problem.cluster, Random(seed)))
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert isclose(one.certificate.value, other.certificate.value, rel_tol=CLOSE)
        assert isclose(one.certificate.lower_bound, other.certificate.lower_bound, rel_tol=BOUND_CLOSE)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_devices=4, max_layers=6), st.integers(0, 99))
def test_order_and_names_do_not_matter(problem: Problem, seed: int):
    check_order(problem, seed)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_devices=3, max_layers=4))
def test_plans_equal_brute_force_over_chunks_and_coordinators(problem: Problem):
    best = inf
    for where in every_coordinator(problem.cluster):
        for chunk in every_chunk(problem.workload):
            asked = make_problem(problem.model, where, problem.workload, problem.weight_formats, chunk)
            numbers = every_microbatches(problem.workload, len(where.devices))
            best = min(best, *(BruteForce(asked, number).best() for number in numbers))
    plan = planned(problem, problem.cluster)
    assert (plan is None) == (best == inf)
    if plan is not None:
        assert isclose(plan.certificate.value, best, rel_tol=CLOSE)
        assert plan.certificate.lower_bound <= best * (1 + CLOSE)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_devices=3, max_layers=4, hosts=("a", "b", "c")))
def test_no_explanation_has_a_better_plan(problem: Problem):
    """Whatever is taken away, the certificate's bound holds."""
    plan = planned(problem, problem.cluster)
    if plan is None:
        return
    why = explain(plan)
    for part in (*why.losses, *why.left_out):
        if part.division is not None:
            assert part.division.value >= plan.certificate.lower_bound * (1 - CLOSE)


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_hosts_without_a_link_the_better_is_planned(order: int):
    devices = [cpu("slow", 20, 0.5, host="a"), cpu("fast", 20, host="b")][::order]
    plan = make_plan(llama(), cluster(devices, joined=False), workload(), ("fp32",))
    assert (plan.device_ids, plan.cluster.coordinator) == (("fast",), "b")
    assert plan.not_joined == ("slow",)
    joined = make_plan(llama(), cluster(devices), workload(), ("fp32",))
    assert (joined.device_ids, joined.not_joined) == (("fast",), ())


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_devices=4, max_layers=6), st.integers(0, 99))
def test_order_and_names_do_not_matter_at_length(problem: Problem, seed: int):
    check_order(problem, seed)
