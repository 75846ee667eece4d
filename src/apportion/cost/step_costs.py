"""What the scheduler weighs by, from a plan: the stages' times of slightly different steps, set against each other."""

from math import ceil

from apportion.cost.estimate import Steps, plan_timings
from apportion.cost.memory import kv_bytes_per_token
from apportion.cost.objective import microbatch_sequences
from apportion.cost.roofline import Step
from apportion.cost.shard import stage_shards
from apportion.types.cluster import Device
from apportion.types.plan import Plan
from apportion.types.step_costs import StepCosts

_LEAST_TOKEN_S = 1e-9
"""Where the weights' traffic hides a sequence's own time, sequences still count."""


def step_costs(plan: Plan) -> StepCosts:
    context, batch = (
        plan.workload.max_context_tokens,
        microbatch_sequences(plan.workload.concurrency, plan.microbatches),
    )
    full, empty = _stages_s(plan, _decode(batch, context)), _stages_s(plan, _decode(batch, 1))
    alone = _stages_s(plan, _decode(1, 1))
    chunk = _stages_s(plan, _chunk(plan.chunk_tokens))
    per_sequence_s = max(b - a for a, b in zip(alone, empty, strict=True)) / max(batch - 1, 1)
    per_context_s = max(b - a for a, b in zip(empty, full, strict=True)) / (batch * max(context - 1, 1))
    block_bytes = _block_bytes(plan)
    return StepCosts(
        decode_token_s=max(per_sequence_s, _LEAST_TOKEN_S),
        context_token_s=per_context_s,
        prefill_token_s=max(chunk) / plan.chunk_tokens,
        swap_block_s=max(
            size / _host_bytes_per_s(plan.cluster.device(name)) for name, size in block_bytes.items()
        ),
        block_bytes=sum(block_bytes.values()),
        prefill_depth=ceil(sum(chunk) / max(chunk)),
    )


def _decode(sequences: int, context_tokens: int) -> Step:
    return Step(sequences=sequences, new_tokens=1, start_tokens=context_tokens - 1, sampled_rows=sequences)


def _chunk(tokens: int) -> Step:
    return Step(sequences=1, new_tokens=tokens, start_tokens=0, sampled_rows=0)


def _stages_s(plan: Plan, step: Step) -> list[float]:
    """Of every stage and every link: a link is a stage too."""
    steps = Steps(prefill=(), decode=step, overlapping=plan.microbatches > 1)
    timings = plan_timings(plan.model, plan.cluster, plan.stages, steps)
    return [timing.decode_s for timing in timings.all]


def _block_bytes(plan: Plan) -> dict[str, int]:
    """KV bytes of a block on each device."""
    return {
        device_id: plan.block_tokens * kv_bytes_per_token(plan.model, shard)
        for stage in plan.stages
        for device_id, shard in zip(stage.split.device_ids, stage_shards(plan.model, stage), strict=True)
    }


def _host_bytes_per_s(device: Device) -> float:
    """Of a copy between the device and its host's memory: a CPU reads each byte, reads where it goes, and writes it."""
    known = None if device.reads_disk else device.stream_bytes_per_s
    return known or device.mem_bytes_per_s / 3
