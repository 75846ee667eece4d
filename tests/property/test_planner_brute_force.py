"""The planner against every division there is, written without it: all orders, groups, ranges and shares."""

from collections import Counter
from itertools import combinations, product
from math import inf, isclose

import pytest
from enumerated import every_microbatches, rank_order
from hand_model import device as hand_device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apportion.cost.estimate import entry_timing, exit_timing, hop_timing, objective_value, stage_timing
from apportion.cost.memory import stages_memory
from apportion.cost.objective import Goal, Timing
from apportion.cost.workspace import GPU_RUNTIME_BYTES
from apportion.planner.bounds.bound import certify
from apportion.planner.divide import search
from apportion.planner.infeasible.error import whole_bytes
from apportion.planner.problem import Problem, make_problem
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.model import LayerSpec, ModelSpec, Parameters
from apportion.types.plan import Stage, TensorSplit
from apportion.types.workload import Workload

TOLERANCE = 1e-9


def compositions(total, parts):
    return [
        tuple(b - a for a, b in zip((0, *cuts), (*cuts, total), strict=True))
        for cuts in combinations(range(1, total), parts - 1)
    ]


class BruteForce:
    def __init__(self, problem: Problem, microbatches: int):
        self.problem, self.model, self.cluster = problem, problem.model, problem.cluster
        self.home = problem.cluster.coordinator or problem.cluster.devices[0].host
        self.goal: Goal = problem.goal(microbatches)
        self.steps = problem.steps(microbatches)
        self.known: dict[object, list[Timing]] = {}

    def best(self) -> float:
        return min(self.extend(0, frozenset(), self.home, []), default=inf)

    def extend(self, start, used, host, timings):
        if start == self.model.num_layers:
            link = self.link(host, self.home)
            if link:
                yield self.goal.value([*timings, exit_timing(link, self.steps)])
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
                    after = used | {device.id for device in group}
                    yield from self.extend(stop, after, group[0].host, [*timings, hop, timing])

    def best_of_states(self) -> float:
        """The same without going twice from the same devices, host and layer, where both costs are no better."""
        home = self.home
        states = {(0, frozenset(), home): {(0.0, 0.0)}}
        for layer in range(self.model.num_layers):
            for state in [state for state in states if state[0] == layer]:
                costs = undominated(states.pop(state))
                for stop, used, host, path, occupied in self.steps_from(*state):
                    after = states.setdefault((stop, used, host), set())
                    after |= {(p + path, max(o, occupied)) for p, o in costs}
        links = {host: self.link(host, home) for _, _, host in states}
        return (
            min(
                self.goal.combine(p + self.goal.path_s(leave), max(o, self.goal.occupied_s(leave)))
                for (_, _, host), costs in states.items()
                if links[host]
                for leave in [exit_timing(links[host], self.steps)]
                for p, o in costs
            )
            if any(links.values())
            else inf
        )

    def stages_from(self, start, used, host):
        """(stop, devices in use after, host, hop to it, its own timing) of every next stage."""
        for group in self.groups(used):
            link = self.link(host, group[0].host)
            if link is None:
                continue
            if start == 0:
                hop = entry_timing(link, len(group), self.steps)
            else:
                hop = hop_timing(self.model, link, len(group), self.steps, self.problem.activation_format)
            after = used | {device.id for device in group}
            for stop in range(start + 1, self.model.num_layers + 1):
                for timing in self.options(group, start, stop):
                    yield stop, after, group[0].host, hop, timing

    def steps_from(self, start, used, host):
        for stop, after, next_host, hop, timing in self.stages_from(start, used, host):
            path = self.goal.path_s(hop) + self.goal.path_s(timing)
            occupied = max(self.goal.occupied_s(hop), self.goal.occupied_s(timing))
            yield stop, after, next_host, path, occupied

    def groups(self, used):
        """Ranks go by memory, then bandwidth, most first; of equal ones by all their figures."""
        left = [device for device in rank_order(self.cluster.devices) if device.id not in used]
        for size in range(1, self.model.kv_heads + 1):
            for group in combinations(left, size):
                if len({device.host for device in group}) == 1:
                    yield group

    def link(self, a, b):
        return next((link for link in self.cluster.links if {link.src, link.dst} == {a, b}), None)

    def options(self, group, start, stop) -> list[Timing]:
        """Undominated times of all shares; a kind of stage is costed once."""
        layers = Counter(self.model.layers[start:stop])
        ends = (start == 0, stop == self.model.num_layers)
        key = (tuple(device.id for device in group), frozenset(layers.items()), ends)
        if key not in self.known:
            self.known[key] = self.find_options(group, start, stop)
        return self.known[key]

    def find_options(self, group, start, stop) -> list[Timing]:
        timings = [
            stage_timing(self.model, self.cluster, stage, self.steps)
            for heads, columns, weight_format in product(
                compositions(self.model.kv_heads, len(group)),
                compositions(self.model.ffn_columns, len(group)),
                self.problem.weight_formats,
            )
            if all(device.rate(weight_format) for device in group)
            if self.fits(stage := self.stage(group, start, stop, heads, columns, weight_format))
        ]
        return [t for t in set(timings) if not any(dominates(other, t) for other in timings)]

    def stage(self, group, start, stop, heads, columns, weight_format):
        rows = tuple(self.model.vocab_rows // self.model.ffn_columns * count for count in columns)
        split = TensorSplit(
            device_ids=tuple(device.id for device in group),
            q_heads=tuple(h * self.model.q_heads_per_kv_head for h in heads),
            kv_heads=heads,
            ffn_columns=columns,
            vocab_rows=rows,
        )
        return Stage(
            layer_start=start,
            layer_stop=stop,
            split=split,
            weight_format=weight_format,
            activation_format=self.problem.activation_format,
            kv_format=self.problem.kv_format,
            has_embedding=start == 0,
            has_head=stop == self.model.num_layers,
        )

    def fits(self, stage):
        memory = stages_memory(self.model, self.cluster, [stage], self.problem.capacity)
        return all(
            memory[device_id].total_bytes <= self.cluster.device(device_id).memory_bytes
            for device_id in memory
        )


def undominated(costs):
    kept = []
    for path, occupied in sorted(costs):
        if not kept or occupied < kept[-1][1]:
            kept.append((path, occupied))
    return kept


def dominates(a: Timing, b: Timing) -> bool:
    return a != b and a.prefill_s <= b.prefill_s and a.decode_s <= b.decode_s


@st.composite
def layer_specs(draw):
    experts = draw(st.sampled_from([0, 0, 0, 4]))
    return LayerSpec(
        per_kv_head=Parameters(elements=draw(st.integers(1, 4)) * 4096, rows=64, others=0),
        per_ffn_column=Parameters(elements=draw(st.integers(1, 4)) * 4096, rows=16, others=2),
        replicated=Parameters(elements=0, rows=128, others=draw(st.sampled_from([64, 2048]))),
        window_tokens=draw(st.sampled_from([None, 8])),
        num_experts=experts,
        experts_per_token=2 if experts else 0,
    )


@st.composite
def models(draw, max_layers):
    kinds = draw(st.lists(layer_specs(), min_size=1, max_size=2))
    layers = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=max_layers))
    columns = draw(st.sampled_from([3, 5, 7]))  # odd: a granule is one column
    return ModelSpec(
        name="tiny",
        family="llama",
        fingerprint="",
        layers=tuple(layers),
        hidden_size=64,
        q_heads=8,
        kv_heads=draw(st.sampled_from([1, 2, 4])),
        head_dim=16,
        ffn_columns=columns,
        vocab_rows=columns * draw(st.sampled_from([1, 40])),
        tied_embeddings=draw(st.booleans()),
        max_context_tokens=64,
        checkpoint_format="fp32",
    )


FORMATS = st.sampled_from([("fp32",)] * 2 + [("fp32", "int8"), ("bf16", "int8"), ("fp32", "int4")])


@st.composite
def rates(draw, formats):
    """Of one format or of all."""
    known = draw(st.sampled_from([formats, formats, formats[:1], formats[1:] or formats]))
    names = {"fp16" if name == "int4" else name for name in known}
    return {name: draw(st.sampled_from([1e9, 5e9, 4e10])) for name in sorted(names)}


SEQUENCES = (1, 2, 3, 4, 6, 8)
"""From four on several numbers of microbatches have microbatches of the same size."""


@st.composite
def problems(draw, max_devices=3, max_layers=5, hosts=("a", "a", "b"), min_devices=1):
    model = draw(models(max_layers))
    workload = Workload(
        prompt_tokens=draw(st.sampled_from([5, 40])),
        output_tokens=draw(st.sampled_from([1, 16])),
        concurrency=draw(st.sampled_from(SEQUENCES)),
        max_context_tokens=64,
        objective=draw(st.sampled_from(["latency", "throughput"])),
    )
    formats = draw(FORMATS)
    alone = make_problem(model, Cluster(devices=(), links=()), workload, formats, 16)
    room = whole_bytes(alone.narrowest(), hand_device("gpu", kind="cuda")) - GPU_RUNTIME_BYTES
    kind = draw(st.sampled_from(["cpu", "cuda"]))  # fp32 activations, or those of the weights
    devices = tuple(
        Device(
            id=f"d{number}",
            host=draw(st.sampled_from(hosts)) if len(hosts) <= 3 else hosts[number],
            kind=kind,
            torch_device="cpu",
            memory_bytes=GPU_RUNTIME_BYTES + round(room * draw(st.sampled_from([0.3, 0.5, 0.8, 1.3]))),
            reserved_bytes=0,
            mem_bytes_per_s=draw(st.sampled_from([1e9, 3e9])),
            flops_per_s=draw(rates(formats)),
            layer_overhead_s=draw(st.sampled_from([0.0, 1e-5])),
            step_overhead_s=draw(st.sampled_from([0.0, 1e-5])),
            num_threads=1,
            host_cores=None,
            speed=draw(st.sampled_from([1.0, 1.0, 0.5])),
            source="measured",
            host_bytes_per_s=draw(st.sampled_from([None, 2e9, 5e9])),
        )
        for number in range(draw(st.integers(min_devices, max_devices)))
    )
    latency_s = draw(st.sampled_from([0.0, 1e-6, 1e-4]))
    used = sorted({device.host for device in devices})
    inside = [Link(src=host, dst=host, latency_s=latency_s, bytes_per_s=1e9) for host in used]
    across = [
        Link(src=a, dst=b, latency_s=5 * latency_s, bytes_per_s=1e8)
        for a, b in combinations(used, 2)
        if draw(st.booleans()) or len(hosts) > 3
    ]
    return make_problem(model, Cluster(devices=devices, links=(*inside, *across)), workload, formats, 16)


def check_against_brute_force(problem: Problem, find=BruteForce.best):
    numbers = every_microbatches(problem.workload, len(problem.cluster.devices))
    best = min(find(BruteForce(problem, number)) for number in numbers)
    found = search(problem)
    assert (found is None) == (best == inf)
    if found is None:
        return
    value = objective_value(
        problem.model,
        problem.cluster,
        problem.workload,
        found.stages,
        chunk_tokens=problem.capacity.chunk_tokens,
        microbatches=found.microbatches,
    )
    assert isclose(value, best, rel_tol=TOLERANCE)
    certificate = certify([problem], value)
    assert certificate.lower_bound <= best * (1 + TOLERANCE)
    hosts = [device.host for device in problem.cluster.devices]
    if len(set(hosts)) == len(hosts) or problem.model.kv_heads == 1:
        assert certificate.gap <= TOLERANCE


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_planner_equals_brute_force(problem):
    check_against_brute_force(problem)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_devices=4, max_layers=8, hosts=("a", "b", "c", "d")))
def test_pipelines_equal_brute_force_and_the_bound_is_tight(problem):
    check_against_brute_force(problem)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_devices=5, max_layers=24))
def test_larger_clusters_equal_brute_force(problem):
    check_against_brute_force(problem, BruteForce.best_of_states)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_planner_equals_brute_force_at_length(problem):
    check_against_brute_force(problem)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_devices=4, max_layers=8, hosts=("a", "b", "c", "d")))
def test_pipelines_equal_brute_force_at_length(problem):
    check_against_brute_force(problem)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_devices=5, max_layers=24))
def test_five_devices_and_24_layers_equal_brute_force(problem):
    check_against_brute_force(problem, BruteForce.best_of_states)
