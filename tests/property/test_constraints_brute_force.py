"""Constraints on the search against every division that keeps them; the bound stays below the best of these."""

from dataclasses import replace
from fractions import Fraction
from math import floor, inf, isclose

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.test_communication_brute_force import EveryDivision, between, epsilon
from property.test_planner_brute_force import BruteForce, compositions, dominates, problems
from property.test_replicas_brute_force import Replicas, tasks

from apportion.cost.estimate import communication, entry_timing, hop_timing, stage_timing
from apportion.planner.bounds.bound import certify
from apportion.planner.communication.find import least_communication, prove_communication
from apportion.planner.divide import search
from apportion.planner.problem import make_problem
from apportion.planner.replicas.build import make_replicated_plan, served
from apportion.planner.verify.replicas import verify_replicas
from apportion.types.constraints import Constraints, FixedStage, Pin
from apportion.types.errors import InfeasibleError
from apportion.types.workload import BalanceLimit


class Constrained(BruteForce):
    """Every division is made, and those that break a constraint are left out."""

    def best(self) -> float:
        return min(self.every(0, (), self.home, []), default=inf)

    def every(self, start, stages, host, timings):
        """`stages` are (devices, start, stop) so far."""
        used = frozenset(device.id for group, *_ in stages for device in group)
        if start == self.model.num_layers:
            if self.kept(stages, used):
                yield from self.extend(start, used, host, timings)
            return
        for group in self.groups(used):
            link = self.link(host, group[0].host)
            if link is None:
                continue
            if start == 0:
                hop = entry_timing(link, len(group), self.steps)
            else:
                hop = hop_timing(self.model, link, len(group), self.steps, self.problem.activation_format)
            for stop in range(start + 1, self.model.num_layers + 1):
                for timing in self.options(group, start, stop):
                    after = (*stages, (group, start, stop))
                    yield from self.every(stop, after, group[0].host, [*timings, hop, timing])

    def kept(self, stages, used) -> bool:
        constraints = self.problem.constraints
        ids = {device.id for device in self.cluster.devices} - set(constraints.excluded)
        if constraints.groups == "none" and any(len(group) > 1 for group, *_ in stages):
            return False
        if used - ids or (constraints.use_all and used != ids):
            return False
        held = [({device.id for device in group}, start, stop) for group, start, stop in stages]
        return all(self.pinned(pin, held) for pin in constraints.pins) and all(
            (set(one.device_ids), one.layer_start, one.layer_stop) in held for one in constraints.stages
        )

    def pinned(self, pin, held) -> bool:
        return any(
            pin.device_id in ids and set(range(pin.layer_start, pin.layer_stop)) <= set(range(start, stop))
            for ids, start, stop in held
        )

    def find_options(self, group, start, stop):
        timings = [
            stage_timing(self.model, self.cluster, stage, self.steps)
            for heads, columns in self.shares(group)
            for weight_format in self.problem.weight_formats
            if all(device.rate(weight_format) for device in group)
            if self.fits(stage := self.stage(group, start, stop, heads, columns, weight_format))
        ]
        return [t for t in set(timings) if not any(dominates(other, t) for other in timings)]

    def shares(self, group):
        """FFN columns come in granules of 16 where they divide by it."""
        granule = 16 if self.model.ffn_columns % 16 == 0 else 1
        ids = [device.id for device in group]
        laid = [
            one for one in self.problem.constraints.stages if set(one.device_ids) == set(ids) and one.shares
        ]
        for heads in compositions(self.model.kv_heads, len(group)):
            for units in compositions(self.model.ffn_columns // granule, len(group)):
                even = len(set(heads)) == 1 and len(set(units)) == 1
                asked = [dict(zip(one.device_ids, one.shares, strict=True)) for one in laid]
                if not even and self.problem.constraints.groups == "even":
                    continue
                if all(
                    in_ratio(axis, [one[name] for name in ids]) for axis in (heads, units) for one in asked
                ):
                    yield heads, tuple(granule * count for count in units)


def in_ratio(shares, ratio) -> bool:
    """Whether each running sum is the nearest integer, a half going up, but for one unit each at least."""
    total, whole = sum(shares), sum(ratio)
    last = 0
    for number in range(1, len(shares)):
        exact = Fraction(total * sum(ratio[:number]), whole)
        nearest = floor(exact + Fraction(1, 2))
        last = min(max(nearest, last + 1), total - (len(shares) - number))
        if sum(shares[:number]) != last:
            return False
    return True


@st.composite
def constraints(draw):
    return Constraints(
        groups=draw(st.sampled_from(["any", "even", "none"])),
        use_all=draw(st.sampled_from([False, True])),
        excluded=draw(st.sampled_from([(), ("d0",), ("d1",), ("d0", "d1")])),
    )


@st.composite
def pins(draw, devices, num_layers):
    start = draw(st.integers(0, num_layers))
    return Pin(device_id=draw(devices), layer_start=start, layer_stop=draw(st.integers(start, num_layers)))


@st.composite
def stages(draw, devices, num_layers):
    ids = tuple(draw(st.lists(devices, min_size=1, max_size=2, unique=True)))
    start = draw(st.integers(0, num_layers - 1))
    return FixedStage(
        device_ids=ids,
        layer_start=start,
        layer_stop=draw(st.integers(start + 1, num_layers)),
        shares=draw(st.sampled_from([(), (3, 1), (1, 1), (9, 1)])) if len(ids) == 2 else (),
    )


@st.composite
def constrained(draw, **sizes):
    """With FFN columns that some groups divide evenly. Many constraints contradict each other: then nothing fits."""
    problem = draw(problems(**sizes))
    model = problem.model
    if draw(st.booleans()):
        rows = model.vocab_rows // model.ffn_columns
        model = replace(model, ffn_columns=32, vocab_rows=32 * rows)
    devices = st.sampled_from([device.id for device in problem.cluster.devices])
    asked = replace(
        draw(constraints()) if draw(st.booleans()) else Constraints(),
        pins=tuple(draw(st.lists(pins(devices, model.num_layers), max_size=2))),
        stages=tuple(draw(st.lists(stages(devices, model.num_layers), max_size=2))),
    )
    if draw(st.booleans()):
        asked = replace(asked, stages=())
    # A device that is both excluded and named is refused before any search.
    asked = replace(asked, excluded=tuple(name for name in asked.excluded if name not in asked.used))
    return make_problem(model, problem.cluster, problem.workload, problem.weight_formats, 16, asked)


def check(problem):
    most = min(problem.workload.concurrency, 2 * len(problem.cluster.devices))
    numbers = range(1, most + 1) if problem.workload.objective == "throughput" else [1]
    best = min(Constrained(problem, number).best() for number in numbers)
    found = search(problem)
    assert (found is None) == (best == inf)
    if found is not None:
        assert isclose(found.value, best, rel_tol=1e-9)
        for value in (found.value, 1.5 * found.value):
            assert certify([problem], value).lower_bound <= best * (1 + 1e-9)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(constrained(max_layers=4))
def test_constraints_equal_brute_force(problem):
    check(problem)


class ConstrainedReplicas(Replicas):
    """Replicas that leave no device out where all have to take part."""

    def in_chunk(self, cluster, share, chunk) -> float:
        problem = self.task.problem(cluster, share, chunk)
        numbers = range(1, min(share, 2 * len(cluster.devices)) + 1)
        return min(Constrained(problem, number).best() for number in numbers)

    def allowed(self, places) -> bool:
        asked = self.task.constraints
        used = {device.id for device, place in zip(self.task.cluster.devices, places, strict=True) if place}
        usable = {device.id for device in self.task.cluster.devices} - set(asked.excluded)
        return used <= usable and (not asked.use_all or used == usable)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(tasks(max_devices=3), constraints())
def test_replicas_with_constraints_equal_brute_force(task, asked):
    others = [device.id for device in task.cluster.devices[1:]]
    asked = replace(asked, excluded=tuple(name for name in asked.excluded if name in others))
    task = replace(task, constraints=asked)
    best = ConstrainedReplicas(task).best()
    parts = (task.model, task.cluster, task.workload, task.weight_formats, task.num_replicas)
    try:
        plan = make_replicated_plan(*parts, constraints=asked)
    except InfeasibleError:
        assert best == 0
        return
    assert isclose(served(plan.replicas), best, rel_tol=1e-8)
    assert plan.certificate.lower_bound <= (1 + 1e-8) / best
    assert all(check.ok for check in verify_replicas(plan))


class ConstrainedDivisions(EveryDivision):
    """Of least communication: every division, and those left out that break a constraint."""

    def __init__(self, problem):
        super().__init__(problem)
        self.rules = Constrained(problem, 1)
        self.stages = []

    def extend(self, start, used, host, links_s, times_s):
        if start < self.model.num_layers or self.rules.kept(tuple(self.stages), used):
            yield from super().extend(start, used, host, links_s, times_s)

    def options(self, group, start, stop):
        for option in super().options(group, start, stop):
            self.stages.append((group, start, stop))
            yield option
            self.stages.pop()

    def fastest(self, group, start, stop, weight_format):
        if not all(device.rate(weight_format) for device in group):
            return None
        shares = self.rules.shares(group)
        stages = (self.brute.stage(group, start, stop, *pair, weight_format) for pair in shares)
        return min((self.costs(stage, group) for stage in stages if self.brute.fits(stage)), default=None)


def check_communication(problem, part):
    problem = replace(problem, workload=replace(problem.workload, objective="communication"))
    divisions = [
        (links_s, epsilon(times_s, True)) for links_s, times_s, _ in ConstrainedDivisions(problem).all()
    ]
    if not divisions:
        assert least_communication([problem]) is None
        return
    limit = inf if part is None else between([reached for _, reached in divisions], part)
    if part is not None:
        asked = BalanceLimit(seconds=limit)
        problem = replace(problem, workload=replace(problem.workload, balance=asked))
    best = min(links_s for links_s, reached in divisions if reached < limit)
    found = least_communication([problem])
    reached = communication(problem.model, problem.cluster, problem.workload, found.stages).total_s
    assert isclose(reached, best, rel_tol=1e-9)
    assert prove_communication(found.problem, reached).seconds <= best * (1 + 1e-9)
    assert prove_communication(found.problem, 1.5 * reached).seconds <= best * (1 + 1e-9)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(constrained(max_layers=4), st.sampled_from([None, 0.1, 0.5]))
def test_least_communication_with_constraints_equals_brute_force(problem, part):
    check_communication(problem, part)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(constrained(max_layers=5), st.sampled_from([None, 0.1, 0.3, 0.7]))
def test_least_communication_with_constraints_at_length(problem, part):
    check_communication(problem, part)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(constrained(max_devices=4, max_layers=5))
def test_constraints_equal_brute_force_at_length(problem):
    check(problem)
