"""Two plans side by side: every figure that differs, and why it does, in words."""

from collections.abc import Iterator
from dataclasses import dataclass

from apportion.cost.estimate import plan_timings, workload_steps
from apportion.types.plan import Plan
from apportion.types.units import format_bytes, format_seconds, three_digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """`unit` is "s", "bytes", "tokens/s" or "" for a count."""

    name: str
    unit: str
    before: float
    after: float

    @property
    def change(self) -> float | None:
        """Relative; None from nothing to something."""
        if self.before == self.after:
            return 0.0
        return self.after / self.before - 1 if self.before else None


def figures(before: Plan, after: Plan) -> tuple[Figure, ...]:
    rows = zip(_figures(before), _figures(after), strict=True)
    return tuple(Figure(name=name, unit=unit, before=old, after=new) for (name, unit, old), (*_, new) in rows)


def _figures(plan: Plan) -> Iterator[tuple[str, str, float]]:
    of = {"latency": "request alone", "communication": "step on links"}
    objective = of.get(plan.workload.objective, "output token")
    yield f"objective ({objective})", "s", plan.certificate.value
    yield "lower bound", "s", plan.certificate.lower_bound
    yield "TTFT", "s", plan.estimate.ttft_s
    yield "TPOT", "s", plan.estimate.tpot_s
    yield "tokens/s", "tokens/s", plan.estimate.tokens_per_s
    memory = plan.memory.values()
    yield "weights", "bytes", sum(device.weights_bytes for device in memory)
    yield "weights streamed every step", "bytes", sum(device.streamed_bytes for device in memory)
    yield "KV cache", "bytes", sum(device.kv_bytes for device in memory)
    yield "workspace", "bytes", sum(device.workspace_bytes + device.buffer_bytes for device in memory)
    yield "devices in use", "", len(plan.device_ids)
    yield "stages", "", len(plan.stages)
    yield "microbatches", "", plan.microbatches
    yield "prefill chunk", "", plan.chunk_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """`layers` and `heads` as text, "" where the device is not in use."""

    layers: str
    heads: str
    memory_bytes: int


def device_use(plan: Plan) -> dict[str, DeviceUse]:
    """By device in use."""
    return {
        device_id: DeviceUse(
            layers=f"{stage.layer_start}–{stage.layer_stop - 1}",
            heads=f"{stage.split.kv_heads[rank]}/{plan.model.kv_heads}",
            memory_bytes=plan.memory[device_id].total_bytes,
        )
        for stage in plan.stages
        for rank, device_id in enumerate(stage.split.device_ids)
    }


def device_names(before: Plan, after: Plan) -> tuple[str, ...]:
    """Every device of either cluster."""
    devices = (*before.cluster.devices, *after.cluster.devices)
    return tuple(dict.fromkeys(device.id for device in devices))


def reasons(before: Plan, after: Plan) -> tuple[str, ...]:
    """One sentence each: what happened to devices, memory, the times and the bottleneck."""
    return (
        *_device_reasons(before, after),
        *_memory_reasons(before, after),
        *_time_reasons(before, after),
        _bottleneck_reason(before, after),
    )


def _device_reasons(before: Plan, after: Plan) -> Iterator[str]:
    old, new = device_use(before), device_use(after)
    was = {device.id for device in before.cluster.devices}
    still = {device.id for device in after.cluster.devices}
    for name in device_names(before, after):
        if name not in still:
            yield f"{name} is gone: {_held(old[name]) if name in old else 'it was not in use'}"
        elif name not in was:
            yield f"{name} is new: {_holds(new[name]) if name in new else 'no better plan uses it'}"
        elif name in old and name not in new:
            excluded = name in after.constraints.excluded
            yield f"{name} is {'excluded' if excluded else 'no longer in use: the best plan does without it'}"
        elif name in new and name not in old:
            yield f"{name} comes into use: {_holds(new[name])}"
        elif name in new and (old[name].layers, old[name].heads) != (new[name].layers, new[name].heads):
            yield f"{name} {_holds(new[name])}; it had {old[name].layers}, heads {old[name].heads}"


def _held(use: DeviceUse) -> str:
    return f"it held layers {use.layers}, heads {use.heads}, which others take"


def _holds(use: DeviceUse) -> str:
    return f"holds layers {use.layers}, heads {use.heads}"


def _memory_reasons(before: Plan, after: Plan) -> Iterator[str]:
    old, new = (", ".join(plan.weight_formats_in_use) for plan in (before, after))
    if old != new:
        held, holds = (sum(d.weights_bytes for d in plan.memory.values()) for plan in (before, after))
        yield f"weights take {holds / held:.2g}× the bytes: {new} instead of {old}"
    if before.activation_format != after.activation_format:
        yield f"hidden states are in {after.activation_format} instead of {before.activation_format}"
    if before.kv_format != after.kv_format:
        yield f"keys and values are in {after.kv_format} instead of {before.kv_format}"
    was, now = (plan.num_kv_blocks * plan.block_tokens for plan in (before, after))
    if was != now:
        yield (
            f"the KV cache has room for {now} tokens instead of {was}: "
            f"{after.workload.concurrency} × {after.workload.max_context_tokens} of context"
        )
    if before.chunk_tokens != after.chunk_tokens:
        yield f"prompts go in chunks of {after.chunk_tokens} instead of {before.chunk_tokens}: the best that fit"


def _time_reasons(before: Plan, after: Plan) -> Iterator[str]:
    old, new = before.estimate, after.estimate
    if (old.stage_s, old.link_s) != (new.stage_s, new.link_s):
        yield (
            f"a decode microbatch spends {format_seconds(sum(new.stage_s))} in {_stages(after)} and "
            f"{format_seconds(sum(new.link_s))} between them; before {format_seconds(sum(old.stage_s))} in "
            f"{_stages(before)} and {format_seconds(sum(old.link_s))}"
        )
    was_s, now_s = _prompt_s(before), _prompt_s(after)
    if was_s != now_s:
        yield (
            f"a prompt of {after.workload.prompt_tokens} tokens spends {format_seconds(now_s)} in stages and links; "
            f"before {format_seconds(was_s)}"
        )
    if before.microbatches != after.microbatches:
        yield f"{after.microbatches} microbatches are under way at once instead of {before.microbatches}"


def _prompt_s(plan: Plan) -> float:
    steps = workload_steps(plan.workload, plan.chunk_tokens, 1)
    timings = plan_timings(plan.model, plan.cluster, plan.stages, steps)
    return sum(timing.prefill_s for timing in timings.all)


def _stages(plan: Plan) -> str:
    return f"{len(plan.stages)} stage{'s' if len(plan.stages) > 1 else ''}"


def _bottleneck_reason(before: Plan, after: Plan) -> str:
    if before.estimate.bottleneck == after.estimate.bottleneck:
        return f"the bottleneck is still {after.estimate.bottleneck}"
    return f"the bottleneck is {after.estimate.bottleneck}; it was {before.estimate.bottleneck}"


def formatted(value: float, unit: str) -> str:
    match unit:
        case "s":
            return format_seconds(value)
        case "bytes":
            return format_bytes(value)
        case "tokens/s":
            return three_digits(value)
        case _:
            return f"{value:g}"
