"""Checks of what a plan serves: Little's law against the KV cache of every stage, an arrival rate, and limits."""

from dataclasses import replace

from apportion.cost.estimate import objective_value, plan_estimate
from apportion.cost.kv_capacity import kv_rooms
from apportion.cost.service import ROUNDING, served_per_s, system_s, tokens_per_request, within_limits
from apportion.planner.bounds.fewest import prove_fewest
from apportion.planner.problem import plan_problem
from apportion.planner.verify.check import Check
from apportion.types.plan import Plan
from apportion.types.units import format_seconds


def little_check(plan: Plan) -> Check:
    """The sequences in flight that the plan's rate and time imply fit every stage, and serve the rate asked for."""
    workload = replace(plan.workload, objective="throughput")
    value_s = objective_value(
        plan.model,
        plan.cluster,
        workload,
        plan.stages,
        chunk_tokens=plan.chunk_tokens,
        microbatches=plan.microbatches,
    )
    rate, in_system_s = served_per_s(workload, value_s), system_s(workload, value_s)
    tokens, planned = (
        rate * in_system_s * tokens_per_request(workload),
        plan.num_kv_blocks * plan.block_tokens,
    )
    rooms = [planned + room.spare_blocks * plan.block_tokens for room in kv_rooms(plan)]
    least = min(range(len(rooms)), key=lambda number: rooms[number])
    asked = "" if workload.arrival_rate is None else f" ({workload.arrival_rate:g}/s asked)"
    return Check(
        name="Little's law",
        statement=f"{rate:.3g} requests/s{asked} × {format_seconds(in_system_s)} in the system = "
        f"{workload.concurrency} in flight, {tokens:.0f} tokens of {tokens_per_request(workload)} each; every stage "
        f"has KV for {planned}, and stage {least} ({'+'.join(plan.stages[least].split.device_ids)}) limits it: all "
        f"its memory would hold {rooms[least]}",
        ok=tokens <= planned * ROUNDING
        and planned <= rooms[least]
        and rate * ROUNDING >= (workload.arrival_rate or 0.0),
    )


def fewest_check(plan: Plan) -> Check:
    """A plan that claims nothing is one that nothing was proven for."""
    used, claimed = len(plan.device_ids), plan.certificate.fewest_devices
    proven = prove_fewest(plan_problem(plan), used)
    claim = "nothing" if claimed is None else str(claimed.number)
    return Check(
        name="fewest devices",
        statement=f"no plan has fewer than {proven.number}, certificate says {claim}, {used} are used;"
        f" {proven.method}",
        ok=claimed is None or claimed.number <= proven.number,
    )


def limits_check(plan: Plan) -> Check:
    workload, fresh = plan.workload, plan_estimate(plan)
    parts = [
        f"{name} {format_seconds(seconds)} of {format_seconds(limit)}"
        for name, seconds, limit in (
            ("TTFT", fresh.ttft_s, workload.ttft_limit_s),
            ("TPOT", fresh.tpot_s, workload.tpot_limit_s),
        )
        if limit is not None
    ]
    return Check(
        name="limits",
        statement=f"{' and '.join(parts) or 'none'}, with {workload.concurrency} sequences running at once",
        ok=within_limits(workload, fresh),
    )
