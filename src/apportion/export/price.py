"""What a division is predicted to do in an engine, beside the plan's own."""

from apportion.cost.estimate import Timings, estimate, plan_estimate, plan_timings, workload_steps
from apportion.export.launch import EngineDivision
from apportion.types.plan import Estimate, Plan


def price_sentence(plan: Plan, made: Plan, division: EngineDivision) -> str:
    """Of a division on the cluster of `made`, the plan within what the engine can do."""
    text = cost_sentence(plan, division_tokens_per_s(made, division), decode_s(made, division))
    if any(made.cluster.device(device_id).emulated for device_id in made.device_ids):
        text += ", with the emulated devices as slow as the plan has them"
    return text


def cost_sentence(plan: Plan, tokens_per_s: float, token_s: float) -> str:
    """Against the plan as it is; `token_s` is the time from one token of a sequence to the next."""
    planned = plan_estimate(plan)
    return (
        f"predicted {tokens_per_s:.3g} tokens/s with prompts, {token_s:.2g} s from token to token, for what it would "
        f"execute; {planned.tokens_per_s:.3g} tokens/s, {planned.tpot_s:.2g} s for the plan "
        f"({tokens_per_s / planned.tokens_per_s - 1:+.0%})"
    )


def decode_s(plan: Plan, division: EngineDivision) -> float:
    """From one token of a sequence to the next, with all sequences running."""
    if division.pipelined_prefill:
        return _pipelined(plan, division).tpot_s
    return sum(timing.decode_s for timing in _serial_timings(plan, division).all)


def division_tokens_per_s(plan: Plan, division: EngineDivision) -> float:
    if not division.pipelined_prefill:
        return _serial_tokens_per_s(plan, division)
    return _pipelined(plan, division).tokens_per_s


def _pipelined(plan: Plan, division: EngineDivision) -> Estimate:
    return estimate(
        plan.model,
        plan.cluster,
        plan.workload,
        division.stages,
        chunk_tokens=plan.chunk_tokens,
        microbatches=division.microbatches,
    )


def _serial_tokens_per_s(plan: Plan, division: EngineDivision) -> float:
    """One batch on its way: prompts one after the other, then all sequences' tokens together."""
    workload, timings = plan.workload, _serial_timings(plan, division)
    prefill_s = sum(timing.prefill_s for timing in timings.all)
    decode_s = sum(timing.decode_s for timing in timings.all)
    total_s = workload.concurrency * prefill_s + (workload.output_tokens - 1) * decode_s
    return workload.concurrency * workload.output_tokens / total_s


def _serial_timings(plan: Plan, division: EngineDivision) -> Timings:
    steps = workload_steps(plan.workload, plan.chunk_tokens, plan.workload.concurrency)
    return plan_timings(plan.model, plan.cluster, division.stages, steps)
