"""Checks a plan from the plan alone: every figure is recomputed with the cost model, the bound by bounds/bound.py.

The search that made the plan takes no part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple
from itertools import pairwise
from math import isclose

from apportion.cost.estimate import communication, estimate_times_s, plan_estimate, plan_objective_value
from apportion.cost.formats import weight_formats
from apportion.cost.kv_capacity import kv_rooms
from apportion.cost.memory import kv_blocks, parameters, plan_memory
from apportion.cost.statements import (
    model_parameters,
    pipeline,
    replicated_bytes,
    replicated_parameters,
    token_communication,
    whole_model_bytes,
)
from apportion.cost.step_costs import step_costs
from apportion.cost.traffic import coordinator_host, host_link, not_joined
from apportion.planner.balance import balance
from apportion.planner.bounds.bound import certify
from apportion.planner.problem import alternatives, plan_problem
from apportion.planner.verify.check import Check
from apportion.planner.verify.communication import balance_limit_check
from apportion.planner.verify.constraints import constraints_check
from apportion.planner.verify.service import fewest_check, limits_check, little_check
from apportion.planner.verify.streams import host_room_check, streams_check
from apportion.types.model import ModelSpec
from apportion.types.plan import Estimate, Plan, Stage
from apportion.types.units import FORMAT_BYTES, KV_BITS, format_bytes, format_seconds

RELATIVE_TOLERANCE = 1e-9
BOUND_TOLERANCE = 1e-6


def verify(plan: Plan) -> list[Check]:
    """All checks; where the plan's structure is wrong, only those of the structure: the rest has no meaning."""
    structure = [
        _layers(plan),
        _shares(plan),
        _devices(plan),
        _formats(plan),
        streams_check(plan),
        _links(plan),
        *constraints_check(plan),
    ]
    if not all(check.ok for check in structure):
        return structure
    return [
        *structure,
        _memory(plan),
        *host_room_check(plan),
        _conservation(plan),
        _objective(plan),
        _lower_bound(plan),
        _estimate(plan),
        _balance(plan),
        _step_costs(plan),
        *balance_limit_check(plan),
        _pipeline(plan),
        _communication(plan),
        little_check(plan),
        *([limits_check(plan)] if plan.workload.limited else []),
        *([fewest_check(plan)] if plan.workload.objective == "fewest-devices" else []),
    ]


def _layers(plan: Plan) -> Check:
    cuts = [(stage.layer_start, stage.layer_stop) for stage in plan.stages]
    tiled = cuts[0][0] == 0 and cuts[-1][1] == plan.model.num_layers
    tiled &= all(start < stop for start, stop in cuts)
    tiled &= all(before[1] == after[0] for before, after in pairwise(cuts))
    ends = [(stage.has_embedding, stage.has_head) for stage in plan.stages]
    last = len(ends) - 1
    tiled &= all(end == (index == 0, index == last) for index, end in enumerate(ends))
    ranges = ", ".join(f"[{start}, {stop})" for start, stop in cuts)
    return Check(
        name="layers",
        statement=f"stages {ranges} tile the {plan.model.num_layers} layers; embedding first, head last",
        ok=tiled,
    )


def _shares(plan: Plan) -> Check:
    model = plan.model
    return Check(
        name="shares",
        statement=f"every stage's shares add up to {model.kv_heads} KV heads, {model.q_heads} query heads, "
        f"{model.ffn_columns} FFN columns and {model.vocab_rows} vocabulary rows",
        ok=all(_shares_add_up(model, stage) for stage in plan.stages),
    )


def _shares_add_up(model: ModelSpec, stage: Stage) -> bool:
    split = stage.split
    axes = (
        (split.kv_heads, model.kv_heads, 1),
        (split.q_heads, model.q_heads, 1),
        (split.ffn_columns, model.ffn_columns, 1),
        (split.vocab_rows, model.vocab_rows, 0),
    )
    whole = all(
        sum(shares) == total and min(shares) >= least and len(shares) == split.size
        for shares, total, least in axes
    )
    ratio = model.q_heads_per_kv_head
    return whole and split.q_heads == tuple(heads * ratio for heads in split.kv_heads)


def _devices(plan: Plan) -> Check:
    hosts = {device.id: device.host for device in plan.cluster.devices}
    used = plan.device_ids
    ok = len(hosts) == len(plan.cluster.devices) and len(set(used)) == len(used)
    ok &= all(device_id in hosts for device_id in used)
    ok &= all(
        len({hosts.get(device_id) for device_id in stage.split.device_ids}) == 1 for stage in plan.stages
    )
    return Check(
        name="devices",
        statement=f"{len(used)} of {len(hosts)} devices are used, each once, a group's on one host",
        ok=ok,
    )


def _formats(plan: Plan) -> Check:
    """Of stages whose devices are known."""
    known = {device.id: device for device in plan.cluster.devices}
    ok = len({(stage.activation_format, stage.kv_format) for stage in plan.stages}) == 1
    ok &= plan.workload.kv_format in (None, plan.kv_format)
    ok &= plan.activation_format in FORMAT_BYTES and plan.kv_format in KV_BITS
    ok &= set(plan.weight_formats) <= weight_formats(plan.model).keys()
    ok &= all(
        stage.weight_format in plan.weight_formats
        and all(known[name].rate(stage.weight_format) for name in stage.split.device_ids if name in known)
        for stage in plan.stages
    )
    return Check(
        name="formats",
        statement=f"weights are in {', '.join(plan.weight_formats_in_use)} "
        f"(allowed: {', '.join(plan.weight_formats)}), which their devices have a rate for; hidden states in "
        f"{plan.activation_format}, keys and values in {plan.kv_format}",
        ok=ok,
    )


def _links(plan: Plan) -> Check:
    hosts = {device.id: device.host for device in plan.cluster.devices}
    home = coordinator_host(plan.cluster)
    route = [home, *(hosts.get(stage.split.device_ids[0], home) for stage in plan.stages), home]
    joined = [(src, dst) for src, dst in pairwise(route)]
    joined += [
        (host, host) for host, stage in zip(route[1:], plan.stages, strict=False) if stage.split.size > 1
    ]
    return Check(
        name="links",
        statement=f"every message has a link: {' → '.join(route)}",
        ok=all(host_link(plan.cluster, src, dst) is not None for src, dst in joined)
        and plan.not_joined == not_joined(plan.cluster, plan.stages),
    )


def _memory(plan: Plan) -> Check:
    needed = plan_memory(plan)
    fits = all(
        memory.total_bytes <= plan.cluster.device(device_id).memory_bytes
        for device_id, memory in needed.items()
    )
    workload = plan.workload
    kv_tokens = plan.num_kv_blocks * plan.block_tokens
    asked = kv_blocks(workload, plan.block_tokens) * plan.block_tokens
    holds = kv_tokens >= asked and plan.kv_rooms in ((), kv_rooms(plan))
    figures = ", ".join(
        f"{device_id} {format_bytes(memory.total_bytes)} of "
        f"{format_bytes(plan.cluster.device(device_id).memory_bytes)}"
        for device_id, memory in needed.items()
    )
    return Check(
        name="memory",
        statement=f"{figures}, with room for {kv_tokens} tokens of context ({asked} asked, for "
        f"{workload.concurrency} × {workload.max_context_tokens})",
        ok=fits and holds and needed == plan.memory,
    )


def _conservation(plan: Plan) -> Check:
    held = sum(
        parameters(plan.model, stage, rank) for stage in plan.stages for rank in range(stage.split.size)
    )
    replicated = replicated_parameters(plan)
    whole = model_parameters(plan.model)
    before = whole_model_bytes(plan)
    after = {
        name: memory.weights_bytes + memory.streamed_bytes + memory.kv_bytes
        for name, memory in plan.memory.items()
    }
    each = ", ".join(f"{name} {format_bytes(size)}" for name, size in after.items())
    planned = sum(after.values())
    conserved = before + replicated_bytes(plan)
    return Check(
        name="conservation",
        statement=f"weights and KV undivided {format_bytes(before)}; divided {each}; "
        f"{held} parameters held = {whole} of the model + {replicated} replicated",
        ok=held == whole + replicated and planned == conserved,
    )


def _objective(plan: Plan) -> Check:
    value = plan_objective_value(plan)
    certificate = plan.certificate
    return Check(
        name="objective",
        statement=f"{plan.workload.objective} {format_seconds(value)}, certificate says "
        f"{format_seconds(certificate.value)}",
        ok=_equal(value, certificate.value) and certificate.objective == plan.workload.objective,
    )


def _lower_bound(plan: Plan) -> Check:
    claimed = plan.certificate
    proven = certify(alternatives(plan_problem(plan)), plan_objective_value(plan))
    sound = claimed.lower_bound <= min(proven.lower_bound, claimed.value) * (1 + BOUND_TOLERANCE)
    consistent = claimed.lower_bound > 0 and isclose(
        claimed.value / claimed.lower_bound - 1, claimed.gap, abs_tol=BOUND_TOLERANCE
    )
    return Check(
        name="lower bound",
        statement=f"no plan is below {format_seconds(proven.lower_bound)}, certificate says "
        f"{format_seconds(claimed.lower_bound)}: gap {claimed.gap:.2%}; {proven.method}",
        ok=sound and consistent,
    )


def _estimate(plan: Plan) -> Check:
    fresh = plan_estimate(plan)
    return Check(
        name="estimate",
        statement=f"TTFT {format_seconds(fresh.ttft_s)}, TPOT {format_seconds(fresh.tpot_s)}, "
        f"{fresh.tokens_per_s:.1f} tokens/s; bottleneck {fresh.bottleneck}",
        ok=_same_estimate(fresh, plan.estimate),
    )


def _same_estimate(a: Estimate, b: Estimate) -> bool:
    pairs = [(a.ttft_s, b.ttft_s), (a.tpot_s, b.tpot_s), (a.tokens_per_s, b.tokens_per_s)]
    return (
        all(_equal(x, y) for x, y in pairs)
        and _all_equal(a.stage_s, b.stage_s)
        and _all_equal(a.link_s, b.link_s)
        and a.bottleneck == b.bottleneck
        and a.uncertainty == b.uncertainty
    )


def _balance(plan: Plan) -> Check:
    fresh = balance(plan_problem(plan), plan.stages, plan.microbatches)
    pair = (fresh.epsilon_s, fresh.smallest_epsilon_s)
    return Check(
        name="balance",
        statement=f"stage times lie within ε = {format_seconds(pair[0])} of their mean; the smallest ε of any "
        f"allocation of layers to these stages is {format_seconds(pair[1])}",
        ok=_all_equal(pair, (plan.balance.epsilon_s, plan.balance.smallest_epsilon_s)),
    )


def _step_costs(plan: Plan) -> Check:
    costs = step_costs(plan)
    times = (costs.decode_token_s, costs.prefill_token_s, costs.swap_block_s)
    decode, prefill, swap = (format_seconds(seconds) for seconds in times)
    return Check(
        name="step costs",
        statement=f"the scheduler counts {decode} for one sequence more in a decode step, {prefill} for a token of a"
        f" prompt, {swap} for a block swapped",
        ok=_all_equal(astuple(costs), astuple(plan.step_costs)),
    )


def _pipeline(plan: Plan) -> Check:
    times_s = estimate_times_s(plan_estimate(plan))
    claimed = pipeline(estimate_times_s(plan.estimate), len(plan.stages), plan.microbatches)
    fresh = pipeline(times_s, len(plan.stages), plan.microbatches)
    return Check(
        name="pipeline",
        statement=f"P = {plan.microbatches} microbatches through {len(plan.stages)} stages take Σs + (P−1)·s_max = "
        f"{format_seconds(fresh.makespan_s)}: {fresh.microbatches_per_s:.2f}/s; P·S/s_max = "
        f"{fresh.stage_executions_per_s:.2f}/s counts stage executions of P replicas, not results",
        ok=_equal(claimed.makespan_s, fresh.makespan_s)
        and fresh.microbatches_per_s <= (1 + RELATIVE_TOLERANCE) / max(times_s),
    )


def _communication(plan: Plan) -> Check:
    token = token_communication(plan)
    hop_s = sum(plan_estimate(plan).link_s)
    step = communication(plan.model, plan.cluster, plan.workload, plan.stages)
    return Check(
        name="communication",
        statement=f"a token makes {token.messages} messages of {format_bytes(token.payload_bytes)} in all between "
        f"and inside stages; hops take {format_seconds(hop_s)} a microbatch; a step of all {plan.workload.concurrency}"
        f" spends {format_seconds(step.total_s)} on links",
        ok=_equal(hop_s, sum(plan.estimate.link_s)),
    )


def _equal(a: float, b: float) -> bool:
    return isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-15)


def _all_equal(a: Iterable[float], b: Sequence[float]) -> bool:
    values = tuple(a)
    return len(values) == len(b) and all(map(_equal, values, b))
