"""What engines can do, against every division that keeps to it; the bound stays below the best of these."""

from dataclasses import replace
from math import inf, isclose

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.test_constraints_brute_force import Constrained
from property.test_planner_brute_force import problems

from apportion.planner.bounds.bound import certify
from apportion.planner.divide import search
from apportion.planner.infeasible.error import whole_bytes
from apportion.planner.problem import make_problem
from apportion.types.constraints import Constraints, EngineLimits


class WithinEngine(Constrained):
    def kept(self, stages, used) -> bool:
        engine, main = self.problem.constraints.engine, self.home
        assert used is not None
        later = [device for group, *_ in stages[1:] for device in group]
        return all(len(group) == engine.group_size for group, *_ in stages) and not (
            engine.cpu_first and any(device.kind == "cpu" and device.host == main for device in later)
        )


@st.composite
def within_engine(draw):
    """Devices of random kinds, few with room for the whole model; FFN columns that groups of two divide."""
    problem = draw(problems(max_layers=4, hosts=("a", "a", "b")))
    model = problem.model
    rows = model.vocab_rows // model.ffn_columns
    model = replace(model, ffn_columns=32, vocab_rows=32 * rows)
    size = draw(st.sampled_from([1, 1, 2]))
    limits = EngineLimits(
        name="some engine",
        group_size=size,
        cpu_first=draw(st.booleans()),
        embedding_on_host=draw(st.booleans()),
        step_tokens=16,
        buffer_bytes={},
    )
    constraints = Constraints(groups="even" if size > 1 else "none", engine=limits)
    cluster, workload, formats = problem.cluster, problem.workload, problem.weight_formats
    alone = make_problem(model, cluster, workload, formats, 16, constraints).narrowest()
    devices = []
    for device in cluster.devices:
        kind = draw(st.sampled_from(["cpu", "cuda"]))
        whole = whole_bytes(alone, replace(device, kind=kind))
        share = draw(st.sampled_from([0.5, 0.7, 0.9, 1.1]))
        devices.append(replace(device, kind=kind, memory_bytes=round(share * whole)))
    return make_problem(model, replace(cluster, devices=tuple(devices)), workload, formats, 16, constraints)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(within_engine())
def test_divisions_within_an_engine_equal_brute_force(problem):
    most = min(problem.workload.concurrency, 2 * len(problem.cluster.devices))
    numbers = range(1, most + 1) if problem.workload.objective == "throughput" else [1]
    best = min(WithinEngine(problem, number).best() for number in numbers)
    found = search(problem)
    assert (found is None) == (best == inf)
    if found is not None:
        assert isclose(found.value, best, rel_tol=1e-9)
        devices = [
            [problem.cluster.device(name) for name in stage.split.device_ids] for stage in found.stages
        ]
        assert WithinEngine(problem, 1).kept([(group,) for group in devices], set())
        for value in (found.value, 1.5 * found.value):
            assert certify([problem], value).lower_bound <= best * (1 + 1e-9)
