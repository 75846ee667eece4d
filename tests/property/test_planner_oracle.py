"""The search and the bound against OR-tools' CP-SAT, which chooses devices, groups, order, layers and shares at once.

It shares the cost model with the planner, and the list of undominated shares with the brute force. Beside SciPy's
HiGHS in one process OR-tools was found troublesome, so `solve` runs in one of its own, which answers each line of
JSON with the optimum.
"""

import importlib.util
import inspect
import json
import subprocess
import sys
from itertools import product

import pytest
from enumerated import every_microbatches
from hypothesis import HealthCheck, given, settings
from property.test_planner_brute_force import BruteForce, problems

from apportion.cost.estimate import exit_timing, objective_value
from apportion.planner.bounds.bound import certify
from apportion.planner.divide import search

SCALE = 10**9
"""The plan's value in the oracle's integers."""
CLOSE = 1e-7
"""Relative: a few dozen costs rounded to integers."""

needs_ortools = pytest.mark.skipif(importlib.util.find_spec("ortools") is None, reason="needs ortools")


@pytest.fixture(scope="module")
def oracle():
    answering = "for line in sys.stdin:\n    print(json.dumps(solve(json.loads(line))), flush=True)"
    script = f"import json, sys\n{inspect.getsource(solve)}\n{answering}"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:

        def ask(instance):
            process.stdin.write(json.dumps(instance) + "\n")
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def instance(problem, microbatches, value):
    """Arcs [start, stop, host before, host, devices, path, occupied], and [host, path, occupied] of leaving."""
    brute = BruteForce(problem, microbatches)
    hosts = list(dict.fromkeys(device.host for device in problem.cluster.devices))
    home, goal = brute.home, brute.goal
    unit = SCALE / (value * goal.per)
    arcs = [
        [start, stop, src, host, sorted(used), round(path * unit), round(occupied * unit)]
        for start, src in product(range(problem.model.num_layers), hosts)
        if start or src == home
        for stop, used, host, path, occupied in brute.steps_from(start, frozenset(), src)
    ]
    leaving = [
        [host, round(goal.path_s(timing) * unit), round(goal.occupied_s(timing) * unit)]
        for host in hosts
        if (link := brute.link(host, home))
        for timing in [exit_timing(link, brute.steps)]
    ]
    return {
        "layers": problem.model.num_layers,
        "arcs": arcs,
        "leaving": leaving,
        "sum": problem.workload.objective == "latency",
    }


def check_against_oracle(problem, oracle):
    numbers = every_microbatches(problem.workload, len(problem.cluster.devices))
    found = search(problem)
    if found is None:
        assert all(oracle(instance(problem, number, 1.0)) is None for number in numbers)
        return
    value = objective_value(
        problem.model,
        problem.cluster,
        problem.workload,
        found.stages,
        chunk_tokens=problem.capacity.chunk_tokens,
        microbatches=found.microbatches,
    )
    answers = [oracle(instance(problem, number, value)) for number in numbers]
    best = min(answer for answer in answers if answer is not None) / SCALE
    assert abs(best - 1) <= CLOSE
    assert certify([problem], value).lower_bound / value <= best + CLOSE


@needs_ortools
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(max_devices=4, max_layers=6))
def test_cp_sat_finds_nothing_better(problem, oracle):
    check_against_oracle(problem, oracle)


@needs_ortools
@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(max_devices=5, max_layers=8))
def test_cp_sat_finds_nothing_better_at_length(problem, oracle):
    check_against_oracle(problem, oracle)


def solve(asked):
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    arcs = [(arc, model.new_bool_var("")) for arc in asked["arcs"]]
    leaving = [(way, model.new_bool_var("")) for way in asked["leaving"]]
    nodes = {(arc[1], arc[3]) for arc, _ in arcs}
    model.add_exactly_one(taken for arc, taken in arcs if arc[0] == 0)
    model.add_exactly_one(taken for _, taken in leaving)
    for layer, host in nodes:
        out = [taken for arc, taken in arcs if (arc[0], arc[2]) == (layer, host)]
        if layer == asked["layers"]:
            out = [taken for way, taken in leaving if way[0] == host]
        model.add(sum(taken for arc, taken in arcs if (arc[1], arc[3]) == (layer, host)) == sum(out))
    for device in {device for arc, _ in arcs for device in arc[4]}:
        model.add_at_most_one(taken for arc, taken in arcs if device in arc[4])
    for (host, *_), taken in leaving:
        if (asked["layers"], host) not in nodes:
            model.add(taken == 0)
    costs = [(arc[5], arc[6], taken) for arc, taken in arcs] + [(w[1], w[2], taken) for w, taken in leaving]
    total = sum(path * taken for path, _, taken in costs)
    whole = model.new_int_var(0, 10**15, "")
    for _, occupied, taken in costs:
        model.add(whole >= occupied).only_enforce_if(taken)
    if not asked["sum"]:
        model.add(whole >= total)
    model.minimize(total + whole if asked["sum"] else whole)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return None
    assert status == cp_model.OPTIMAL
    return solver.objective_value
