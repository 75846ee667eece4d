"""Checks a plan of several replicas: every replica as a plan of its own (verify/plan.py), what joins them, and the
bound on all replicas together (replicas/bound.py). The search takes no part."""

from collections.abc import Iterator
from dataclasses import replace
from math import isclose

from apportion.cost.estimate import plan_objective_value
from apportion.planner.replicas.bound import certify_replicas
from apportion.planner.replicas.device_sets import sub_cluster
from apportion.planner.replicas.task import Task, of_replica
from apportion.planner.verify.check import Check
from apportion.planner.verify.plan import BOUND_TOLERANCE, RELATIVE_TOLERANCE, verify
from apportion.types.plan import Plan
from apportion.types.replicated import ReplicatedPlan
from apportion.types.units import format_seconds


def verify_replicas(plan: ReplicatedPlan) -> list[Check]:
    """Of a replica one line where all its checks hold, else those that do not; where one does not hold, no more: the
    rest has no meaning."""
    joined = [_parts(plan), _sequences(plan)]
    each = [check for number, one in enumerate(plan.replicas) for check in _replica(number, one)]
    if not all(check.ok for check in (*joined, *each)):
        return [*joined, *each]
    tokens_per_s = [1 / plan_objective_value(replica) for replica in plan.replicas]
    return [*joined, *each, _objective(plan, tokens_per_s), _lower_bound(plan, sum(tokens_per_s))]


def _replica(number: int, plan: Plan) -> Iterator[Check]:
    checks = verify(plan)
    failed = [check for check in checks if not check.ok]
    for check in failed:
        yield replace(check, name=f"replica {number}: {check.name}")
    if not failed:
        yield Check(
            name=f"replica {number}",
            statement=f"all {len(checks)} checks of a plan hold: {', '.join(check.name for check in checks)}",
            ok=True,
        )


def _parts(plan: ReplicatedPlan) -> Check:
    """Each replica's cluster is a part of the whole one, and they share no device."""
    known = {device.id: device for device in plan.cluster.devices}
    held = [device for replica in plan.replicas for device in replica.cluster.devices]
    ok = len(known) == len(plan.cluster.devices) and len({device.id for device in held}) == len(held)
    ok &= all(known.get(device.id) == device for device in held)
    ok &= all(
        replace(replica.cluster, coordinator=None) == sub_cluster(plan.cluster, replica.cluster.devices)
        for replica in plan.replicas
    )
    ok &= plan.num_asked in (None, len(plan.replicas))
    ok &= all(replica.constraints == of_replica(plan.constraints) for replica in plan.replicas)
    usable = known.keys() - set(plan.constraints.excluded)
    ok &= usable >= {device.id for device in held} and (
        not plan.constraints.use_all or len(held) == len(usable)
    )
    return Check(
        name="replicas",
        statement=f"{len(plan.replicas)} replicas on {len(held)} of {len(known)} devices, none in two; links and"
        " devices are the cluster's",
        ok=ok,
    )


def _sequences(plan: ReplicatedPlan) -> Check:
    """Shared out whole; of one model, for one workload, in the same formats."""
    whole, shares = plan.workload, [replica.workload.concurrency for replica in plan.replicas]
    first = plan.replicas[0]
    ok = sum(shares) == whole.concurrency and whole.concurrency <= (whole.most_sequences or whole.concurrency)
    ok &= whole.objective == "throughput" and whole.limited == (whole.most_sequences is not None)
    ok &= all(
        replica.workload == replace(whole, concurrency=share, most_sequences=None)
        and replica.model == first.model
        and replica.weight_formats == first.weight_formats
        for share, replica in zip(shares, plan.replicas, strict=True)
    )
    return Check(
        name="sequences",
        statement=f"{' + '.join(map(str, shares))} = {whole.concurrency} sequences at once, of one workload and model",
        ok=ok,
    )


def _objective(plan: ReplicatedPlan, tokens_per_s: list[float]) -> Check:
    value, claimed = 1 / sum(tokens_per_s), plan.certificate
    return Check(
        name="objective",
        statement=f"{' + '.join(f'{rate:.1f}' for rate in tokens_per_s)} tokens/s: {format_seconds(value)} per token,"
        f" certificate says {format_seconds(claimed.value)}",
        ok=isclose(value, claimed.value, rel_tol=RELATIVE_TOLERANCE) and claimed.objective == "throughput",
    )


def _lower_bound(plan: ReplicatedPlan, tokens_per_s: float) -> Check:
    claimed = plan.certificate
    task = Task(
        model=plan.model,
        cluster=plan.cluster,
        workload=plan.workload,
        weight_formats=plan.replicas[0].weight_formats,
        num_replicas=plan.num_asked,
        constraints=plan.constraints,
    )
    proven = certify_replicas(task, tokens_per_s, plan.replicas)
    sound = claimed.lower_bound <= min(proven.lower_bound, claimed.value) * (1 + BOUND_TOLERANCE)
    consistent = claimed.lower_bound > 0 and isclose(
        claimed.value / claimed.lower_bound - 1, claimed.gap, abs_tol=BOUND_TOLERANCE
    )
    return Check(
        name="lower bound",
        statement=f"no replicas make more than {1 / proven.lower_bound:.1f} tokens/s, certificate says"
        f" {1 / claimed.lower_bound:.1f}: gap {claimed.gap:.2%}; {proven.method}",
        ok=sound and consistent,
    )
