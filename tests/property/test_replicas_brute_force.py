"""Replicas against every way to give devices and sequences to disjoint pipelines, each divided in every way."""

from dataclasses import replace
from itertools import product
from math import inf, isclose

import pytest
from enumerated import every_chunk, every_coordinator, every_microbatches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planned import cpu, llama, workload
from property.test_planner_brute_force import BruteForce, compositions, problems

from apportion.cost.workspace import GPU_RUNTIME_BYTES
from apportion.planner.replicas import bound as replica_bound
from apportion.planner.replicas import search as replica_search
from apportion.planner.replicas.bound import certify_replicas
from apportion.planner.replicas.build import make_replicated_plan, served
from apportion.planner.replicas.device_sets import sub_cluster
from apportion.planner.replicas.search import ReplicaSearch
from apportion.planner.replicas.task import ReplicaSets, Task
from apportion.planner.verify.replicas import verify_replicas
from apportion.types.cluster import Cluster, Link
from apportion.types.errors import InfeasibleError
from apportion.types.model import LayerSpec, Parameters

ROUNDED = 1 + 1e-8


class Replicas:
    """What every set of devices makes with every share of the sequences, by full enumeration."""

    def __init__(self, task: Task):
        self.task = task
        self.known = {}

    def best(self) -> float:
        """Tokens/s; 0 where there are none."""
        devices, asked = self.task.cluster.devices, self.task.num_replicas
        most = 0.0
        for places in product(range(len(devices) + 1), repeat=len(devices)):  # 0: left out
            parts = [
                tuple(d for d, place in zip(devices, places, strict=True) if place == p)
                for p in set(places) - {0}
            ]
            if not self.allowed(places):
                continue
            if asked in (None, len(parts)) and 0 < len(parts) <= self.task.most_sequences:
                for shares in compositions(self.task.most_sequences, len(parts)):
                    most = max(most, sum(self.rate(*pair) for pair in zip(parts, shares, strict=True)))
        return most

    def allowed(self, places) -> bool:
        """Of each device, which replica it is in; 0: none."""
        return any(places)

    def rate(self, part, share) -> float:
        """−inf where it does not fit."""
        key = (tuple(device.id for device in part), share)
        if key not in self.known:
            self.known[key] = self.least_s(sub_cluster(self.task.cluster, part), share)
        return 1 / self.known[key] if self.known[key] < inf else -inf

    def least_s(self, cluster, share) -> float:
        workload = self.task.share(share)
        return min(
            self.in_chunk(where, share, chunk)
            for where in every_coordinator(cluster)
            for chunk in every_chunk(workload)
        )

    def in_chunk(self, cluster, share, chunk) -> float:
        problem = self.task.problem(cluster, share, chunk)
        numbers = every_microbatches(problem.workload, len(cluster.devices))
        return min(BruteForce(problem, number).best() for number in numbers)


@st.composite
def tasks(draw, max_devices, numbers=(None, None, 1, 2)):
    """Mostly with room for the model more than once."""
    problem = draw(problems(max_devices=max_devices, max_layers=4))
    room = draw(st.sampled_from([1, 3, 3, 5]))
    devices = tuple(
        replace(
            device, memory_bytes=device.memory_bytes + (room - 1) * (device.memory_bytes - GPU_RUNTIME_BYTES)
        )
        for device in problem.cluster.devices
    )
    concurrency = draw(st.integers(2, 4))
    return Task(
        model=problem.model,
        cluster=replace(problem.cluster, devices=devices),
        workload=replace(problem.workload, objective="throughput", concurrency=concurrency),
        weight_formats=problem.weight_formats,
        num_replicas=draw(st.sampled_from([n for n in numbers if n is None or n <= concurrency])),
    )


def check(task):
    every = Replicas(task)
    best = every.best()
    check_ceilings(task, every)
    try:
        plan = make_replicated_plan(
            task.model, task.cluster, task.workload, task.weight_formats, task.num_replicas
        )
    except InfeasibleError:
        assert best == 0
        return
    assert isclose(served(plan.replicas), best, rel_tol=1e-8)
    assert plan.certificate.lower_bound <= ROUNDED / best
    assert all(check.ok for check in verify_replicas(plan))
    assert certify_replicas(task, best / 1.5).lower_bound <= ROUNDED / best


def check_ceilings(task, every):
    """Of every set that was enumerated."""
    of = ReplicaSets(task)
    worth = of.worth()
    for (ids, share), seconds in every.known.items():
        counts = [sum(device.id in ids for device in kind) for kind in of.sets.kinds]
        number = of.sets.counts.tolist().index(counts)
        assert worth[number, of.shares.index(share)] * ROUNDED >= (1 / seconds if seconds < inf else -inf)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(tasks(max_devices=3))
def test_replicas_equal_brute_force(task):
    check(task)


def test_devices_that_are_quick_at_different_layers():
    """d2 computes, the others read: a group's time for the whole model bounds none of its stages."""
    dense = LayerSpec(
        per_kv_head=Parameters(elements=12288, rows=64, others=0),
        per_ffn_column=Parameters(elements=12288, rows=16, others=2),
        replicated=Parameters(elements=0, rows=128, others=64),
        window_tokens=None,
        num_experts=0,
        experts_per_token=0,
    )
    experts = replace(
        dense,
        per_kv_head=replace(dense.per_kv_head, elements=8192),
        per_ffn_column=replace(dense.per_ffn_column, elements=4096),
        window_tokens=8,
        num_experts=4,
        experts_per_token=2,
    )
    model = replace(
        llama(), layers=(dense, dense, experts, experts), hidden_size=64, q_heads=8, kv_heads=2, head_dim=16,
        ffn_columns=5, vocab_rows=5, max_context_tokens=64, checkpoint_format="fp32",
    )  # fmt: skip
    small = replace(
        cpu("d0", 1), kind="cuda", memory_bytes=3572094, mem_bytes_per_s=3e9, step_overhead_s=1e-5
    )
    devices = (
        replace(small, flops_per_s={"bf16": 5e9}, layer_overhead_s=1e-5),
        replace(small, id="d1", flops_per_s={"bf16": 5e9, "int8": 5e9}, layer_overhead_s=0.0),
        replace(
            small, id="d2", memory_bytes=4282704, mem_bytes_per_s=1e9,
            flops_per_s={"bf16": 4e10, "int8": 5e9}, layer_overhead_s=1e-5,
        ),
    )  # fmt: skip
    link = Link(src="local", dst="local", latency_s=1e-6, bytes_per_s=1e9)
    asked = replace(workload("throughput", concurrency=4, context=64), prompt_tokens=40, output_tokens=1)
    joined = Cluster(devices=devices, links=(link,))
    check(
        Task(model=model, cluster=joined, workload=asked, weight_formats=("bf16", "int8"), num_replicas=None)
    )


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(tasks(max_devices=3, numbers=(None,)))
def test_bound_and_search_that_stop_early_are_sound(task):
    best = Replicas(task).best()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica_bound, "MAX_EFFORT", 2)
        patch.setattr(replica_search, "MAX_EFFORT", 2)
        found = ReplicaSearch(ReplicaSets(task)).best()
        assert not found or sum(1 / one.value for _, one in found) <= best * ROUNDED
        if best > 0:
            assert certify_replicas(task, best / 2).lower_bound <= ROUNDED / best
            patch.setattr(replica_bound, "MAX_SETS", 0)
            assert certify_replicas(task, best / 2).lower_bound <= ROUNDED / best


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(tasks(max_devices=4, numbers=(None, None, 1, 2, 3)))
def test_replicas_equal_brute_force_at_length(task):
    check(task)
