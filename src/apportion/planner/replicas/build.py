"""Several pipelines of one model on disjoint devices, for the most tokens/s together."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from apportion.cost.traffic import coordinator_host
from apportion.planner.build import certified
from apportion.planner.found import Found
from apportion.planner.infeasible.constraints import check_constraints
from apportion.planner.replicas.bound import MAX_SETS, certify_replicas
from apportion.planner.replicas.device_sets import DeviceSets
from apportion.planner.replicas.guesses import best_guess
from apportion.planner.replicas.search import ReplicaSearch
from apportion.planner.replicas.task import ReplicaSets, Task
from apportion.planner.stages.groups import Used
from apportion.types.cluster import Cluster
from apportion.types.constraints import UNCONSTRAINED, Constraints
from apportion.types.errors import InfeasibleError, UsageError
from apportion.types.model import ModelSpec
from apportion.types.plan import PLAN_VERSION, Plan
from apportion.types.replicated import ReplicatedPlan
from apportion.types.workload import Workload


def make_replicated_plan(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    num_replicas: int | None,
    constraints: Constraints = UNCONSTRAINED,
) -> ReplicatedPlan:
    """The best replicas, certified: so many, or of any number where it is None. They hold all their weights.

    Raises UsageError for a workload that replicas do not go with, InfeasibleError where there is no such number of
    disjoint sets of devices that hold the model.
    """
    check_workload(workload, num_replicas)
    check_constraints(model, cluster, workload, constraints)
    check_replicable(constraints)
    task = Task(
        model=model,
        cluster=cluster,
        workload=replace(workload, most_sequences=workload.concurrency if workload.limited else None),
        weight_formats=weight_formats,
        num_replicas=num_replicas,
        constraints=constraints,
    )
    sets = DeviceSets(cluster, constraints)
    found = best_guess(task, sets) if sets.num_sets > MAX_SETS else ReplicaSearch(ReplicaSets(task)).best()
    if not found:
        raise _infeasible(task)
    replicas = _placed(sets, found)
    sequences = sum(replica.workload.concurrency for replica in replicas)
    return ReplicatedPlan(
        version=PLAN_VERSION,
        cluster=cluster,
        workload=replace(task.workload, concurrency=sequences),
        num_asked=num_replicas,
        replicas=replicas,
        certificate=certify_replicas(task, served(replicas), replicas),
        constraints=constraints,
    )


def check_workload(workload: Workload, num_replicas: int | None) -> None:
    """Raises UsageError."""
    if workload.objective != "throughput":
        raise UsageError(
            f"replicas share out the sequences, which is for --objective throughput, not {workload.objective};"
            " leave out --replicas"
        )
    if workload.arrival_rate is not None:
        raise UsageError("--replicas shares out --concurrency; it does not go with --arrival-rate yet")
    if workload.kv_tokens is not None:
        raise UsageError("--kv-tokens is the cache of one pipeline; leave it out beside --replicas")
    if num_replicas is not None and num_replicas > workload.concurrency:
        raise UsageError(
            f"--replicas {num_replicas} is more than --concurrency {workload.concurrency}: each needs a sequence"
        )


def check_replicable(constraints: Constraints) -> None:
    """Raises UsageError for constraints on a single pipeline."""
    if constraints.pins or constraints.stages:
        raise UsageError("--pin and --stage lay out one pipeline; leave out --replicas")


def served(replicas: Sequence[Plan]) -> float:
    """Tokens/s of all, by the objective: each with all its sequences running."""
    return sum(1 / replica.certificate.value for replica in replicas)


def _placed(sets: DeviceSets, found: Sequence[tuple[Used, Found]]) -> tuple[Plan, ...]:
    """The plans, on devices of their own, the most tokens/s first."""
    taken = np.zeros(len(sets.kinds), dtype=np.int64)
    replicas: list[Plan] = []
    for counts, one in sorted(found, key=lambda pair: pair[1].value):
        replicas.append(certified(_on(sets.cluster_of(counts, tuple(taken.tolist())), one)))
        taken += counts
    return tuple(replicas)


def _on(cluster: Cluster, found: Found) -> Found:
    """The same division on other devices of the same kinds."""
    searched = [device.id for device in found.problem.cluster.devices]
    names = dict(zip(searched, [device.id for device in cluster.devices], strict=True))
    stages = tuple(
        replace(
            stage,
            split=replace(stage.split, device_ids=tuple(names[name] for name in stage.split.device_ids)),
        )
        for stage in found.stages
    )
    hosts = {
        before.host: after.host
        for before, after in zip(found.problem.cluster.devices, cluster.devices, strict=True)
    }
    cluster = replace(cluster, coordinator=hosts[coordinator_host(found.problem.cluster)])
    return replace(found, problem=replace(found.problem, cluster=cluster), stages=stages)


def _infeasible(task: Task) -> InfeasibleError:
    asked = "one replica" if task.num_replicas is None else f"{task.num_replicas} replicas"
    workload = task.workload
    limits = " within the limits" if workload.limited else ""
    return InfeasibleError(
        f"{len(task.cluster.devices)} devices have no room for {asked} of {task.model.name} that hold all its weights"
        f" and together {task.most_sequences} × {workload.max_context_tokens} tokens of context{limits};"
        " give --replicas 1, fewer replicas or a shorter --context"
    )
