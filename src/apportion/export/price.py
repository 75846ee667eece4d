"""What a division costs beside the plan's own: predicted tokens/s, and whether the devices can hold it."""

from dataclasses import dataclass

from apportion.cost.estimate import estimate, plan_estimate, plan_timings, workload_steps
from apportion.cost.memory import plan_capacity, stages_memory
from apportion.export.launch import EngineDivision
from apportion.types.plan import Plan
from apportion.types.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    planned_tokens_per_s: float
    tokens_per_s: float
    emulated: bool
    """Whether a device counts as slowed down, as only our own runtime slows it."""
    overfull: tuple[str, ...]
    """For each device that it does not fit: its name, bytes needed and bytes there are."""

    def sentence(self) -> str:
        change = self.tokens_per_s / self.planned_tokens_per_s - 1
        text = (
            f"predicted {self.tokens_per_s:.1f} tokens/s for what it would execute, "
            f"{self.planned_tokens_per_s:.1f} for the plan ({change:+.0%})"
        )
        if self.emulated:
            text += ", with the emulated devices as slow as the plan has them"
        if self.overfull:
            text += "; by the plan's own bytes it does not fit: " + ", ".join(self.overfull)
        return text


def price(plan: Plan, division: EngineDivision) -> Price:
    return Price(
        planned_tokens_per_s=plan_estimate(plan).tokens_per_s,
        tokens_per_s=division_tokens_per_s(plan, division),
        emulated=any(
            plan.cluster.device(device_id).emulated
            for stage in division.stages
            for device_id in stage.split.device_ids
        ),
        overfull=overfull(plan, division),
    )


def division_tokens_per_s(plan: Plan, division: EngineDivision) -> float:
    if not division.pipelined_prefill:
        return _serial_tokens_per_s(plan, division)
    predicted = estimate(
        plan.model,
        plan.cluster,
        plan.workload,
        division.stages,
        chunk_tokens=plan.chunk_tokens,
        microbatches=division.microbatches,
    )
    return predicted.tokens_per_s


def _serial_tokens_per_s(plan: Plan, division: EngineDivision) -> float:
    """One batch on its way: prompts one after the other, then all sequences' tokens together."""
    workload = plan.workload
    steps = workload_steps(workload, plan.chunk_tokens, workload.concurrency)
    timings = plan_timings(plan.model, plan.cluster, division.stages, steps)
    prefill_s = sum(timing.prefill_s for timing in timings.all)
    decode_s = sum(timing.decode_s for timing in timings.all)
    total_s = workload.concurrency * prefill_s + (workload.output_tokens - 1) * decode_s
    return workload.concurrency * workload.output_tokens / total_s


def overfull(plan: Plan, division: EngineDivision) -> tuple[str, ...]:
    memory = stages_memory(plan.model, plan.cluster, division.stages, plan_capacity(plan), affine=False)
    return tuple(
        f"{device_id} needs {format_bytes(used.total_bytes)} of {format_bytes(budget)}"
        for device_id, used in memory.items()
        for budget in [plan.cluster.device(device_id).memory_bytes]
        if used.total_bytes > budget
    )
