"""From stages to seconds: each stage's and link's time, and what a user sees of them (TTFT, TPOT, tokens/s)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from apportion.cost.host_memory import at_work
from apportion.cost.objective import Timing, goal, microbatch_sequences
from apportion.cost.roofline import (
    AnyStep,
    Step,
    attention_s,
    decode_step,
    ffn_column_s,
    head_row_s,
    prefill_steps,
)
from apportion.cost.shard import Shard, stage_shards
from apportion.cost.streaming import streaming_step_s
from apportion.cost.traffic import (
    ID_BYTES,
    LOGIT_BYTES,
    coordinator_host,
    group_link,
    hop_bytes,
    host_link,
    layer_reductions,
    reduction_s,
)
from apportion.cost.uncertainty import uncertainty
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.errors import PlanError
from apportion.types.model import LayerSpec, ModelSpec
from apportion.types.plan import Estimate, Plan, Stage
from apportion.types.units import FORMAT_BYTES
from apportion.types.workload import Workload

Members = Sequence[tuple[Device, Shard]]


def group_step_s(model: ModelSpec, members: Members, link: Link | None, step: AnyStep) -> float:
    """Time of one step: members wait for each other after attention and after the FFN, so a layer takes
    max(attention) + max(FFN) + max(overhead) + reductions; the step adds max(overhead) once. Streamed layers' weights
    arrive meanwhile, or add their time."""
    attention = sum(
        count * group_attention_s(model, members, layer, step) for layer, count in members[0][1].layers
    )
    computing_s = attention + group_rest_s(model, members, link, step)
    return max(streaming_step_s(device, shard, computing_s) for device, shard in members)


def group_attention_s(model: ModelSpec, members: Members, layer: LayerSpec, step: AnyStep) -> float:
    return max(
        attention_s(device, model, layer, shard.kv_heads, step, shard.formats) for device, shard in members
    )


def group_rest_s(model: ModelSpec, members: Members, link: Link | None, step: AnyStep) -> float:
    """All of a step but attention: it depends on the step's tokens alone, not on their context."""
    shards = [shard for _, shard in members]
    ffn_s = sum(
        count * max(_ffn_s(device, shard, layer, step) for device, shard in members)
        for layer, count in shards[0].layers
    )
    overhead_s = shards[0].num_layers * max(device.layer_overhead_s for device, _ in members)
    overhead_s += max(device.step_overhead_s for device, _ in members)
    head_s = max(_head_s(model, device, shard, step) for device, shard in members)
    return ffn_s + overhead_s + head_s + group_exchange_s(model, shards, link, step)


def unsynchronised_step_s(model: ModelSpec, members: Members, step: AnyStep) -> float:
    """The looser form max_g(compute_g): members wait only at the end of the stage, and exchange for free.

    Never more than `group_step_s`."""
    return max(
        sum(
            count
            * (
                attention_s(device, model, layer, shard.kv_heads, step, shard.formats)
                + _ffn_s(device, shard, layer, step)
                + device.layer_overhead_s
            )
            for layer, count in shard.layers
        )
        + _head_s(model, device, shard, step)
        + device.step_overhead_s
        for device, shard in members
    )


def _ffn_s(device: Device, shard: Shard, layer: LayerSpec, step: AnyStep) -> float:
    return shard.ffn_columns * ffn_column_s(device, layer, step.tokens, shard.formats)


def _head_s(model: ModelSpec, device: Device, shard: Shard, step: AnyStep) -> float:
    if not shard.has_head:
        return 0.0
    return shard.vocab_rows * head_row_s(device, model, step.sampled_rows, shard.formats)


def group_exchange_s(model: ModelSpec, shards: Sequence[Shard], link: Link | None, step: AnyStep) -> float:
    """Reductions of a step inside a group, and the gathering of its logits on rank 0."""
    if len(shards) == 1:
        return 0.0
    assert link is not None
    gathered_rows = max(shard.vocab_rows for shard in shards[1:])
    return group_reductions_s(model, shards[0], link, step) + (
        link.seconds(gathered_rows * step.sampled_rows * LOGIT_BYTES)
        if shards[0].has_head and step.sampled_rows
        else 0.0
    )


def group_reductions_s(model: ModelSpec, shard: Shard, link: Link, step: AnyStep) -> float:
    messages = layer_reductions(model, shard.formats.activation_bytes)
    per_layer_s = sum(reduction_s(link, shard.size, step.tokens * size) for size in messages)
    embedding_s = reduction_s(link, shard.size, step.tokens * messages[0]) if shard.has_embedding else 0.0
    return shard.num_layers * per_layer_s + embedding_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The steps that a workload consists of."""

    prefill: tuple[Step, ...]
    decode: AnyStep
    overlapping: bool = False
    """Whether other stages are at work meanwhile, as where several microbatches are under way."""

    def timing(self, seconds: Callable[[AnyStep], float]) -> Timing:
        return Timing(prefill_s=sum(seconds(step) for step in self.prefill), decode_s=seconds(self.decode))


def workload_steps(
    workload: Workload, chunk_tokens: int, sequences: int, *, overlapping: bool = False
) -> Steps:
    return Steps(
        prefill=prefill_steps(workload.prompt_tokens, chunk_tokens),
        decode=decode_step(sequences, workload.prompt_tokens, workload.output_tokens),
        overlapping=overlapping,
    )


def microbatch_steps(workload: Workload, chunk_tokens: int, microbatches: int) -> Steps:
    """All sequences running, shared out among the microbatches."""
    sequences = microbatch_sequences(workload.concurrency, microbatches)
    return workload_steps(workload, chunk_tokens, sequences, overlapping=microbatches > 1)


def objective_steps(workload: Workload, chunk_tokens: int, microbatches: int) -> Steps:
    """The steps the objective counts: one request alone under latency, a full microbatch under throughput."""
    if workload.objective == "latency":
        return workload_steps(workload, chunk_tokens, 1)
    return microbatch_steps(workload, chunk_tokens, microbatches)


def hop_timing(model: ModelSpec, link: Link, group_size: int, steps: Steps, activation_format: str) -> Timing:
    """Hidden states to a stage of `group_size`; its copies share the link."""
    element_bytes = FORMAT_BYTES[activation_format]
    return steps.timing(lambda step: link.seconds(hop_bytes(model, group_size, step.tokens, element_bytes)))


def entry_timing(link: Link, group_size: int, steps: Steps) -> Timing:
    """Token ids from the coordinator to each rank of the first stage."""
    return steps.timing(lambda step: link.seconds(group_size * step.tokens * ID_BYTES))


def exit_timing(link: Link, steps: Steps) -> Timing:
    """A result to the coordinator after every step."""
    return steps.timing(lambda step: link.seconds(step.sampled_rows * ID_BYTES))


def stage_members(model: ModelSpec, cluster: Cluster, stage: Stage) -> Members:
    devices = [cluster.device(device_id) for device_id in stage.split.device_ids]
    return list(zip(devices, stage_shards(model, stage), strict=True))


def members_at_work(cluster: Cluster, members: Members, *, overlapping: bool) -> Members:
    devices = at_work(cluster, [device for device, _ in members], overlapping=overlapping)
    return list(zip(devices, (shard for _, shard in members), strict=True))


def stage_timing(model: ModelSpec, cluster: Cluster, stage: Stage, steps: Steps) -> Timing:
    members = members_at_work(cluster, stage_members(model, cluster, stage), overlapping=steps.overlapping)
    link = group_link(cluster, stage.split.device_ids)
    return steps.timing(lambda step: group_step_s(model, members, link, step))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """`hops` are between stages (one fewer than `stages`), `entry` and `exit` to and from the coordinator."""

    stages: tuple[Timing, ...]
    hops: tuple[Timing, ...]
    entry: Timing
    exit: Timing

    @property
    def all(self) -> tuple[Timing, ...]:
        return (self.entry, *self.stages, *self.hops, self.exit)


def plan_timings(model: ModelSpec, cluster: Cluster, stages: Sequence[Stage], steps: Steps) -> Timings:
    hosts = [cluster.device(stage.split.device_ids[0]).host for stage in stages]
    home = coordinator_host(cluster)
    return Timings(
        stages=tuple(stage_timing(model, cluster, stage, steps) for stage in stages),
        hops=tuple(
            hop_timing(model, _joining(cluster, src, dst), stage.split.size, steps, stage.activation_format)
            for (src, dst), stage in zip(pairwise(hosts), stages[1:], strict=True)
        ),
        entry=entry_timing(_joining(cluster, home, hosts[0]), stages[0].split.size, steps),
        exit=exit_timing(_joining(cluster, hosts[-1], home), steps),
    )


def _joining(cluster: Cluster, src_host: str, dst_host: str) -> Link:
    link = host_link(cluster, src_host, dst_host)
    if link is None:
        raise PlanError(
            f"the plan sends from host {src_host} to {dst_host}, but the cluster has no link there"
        )
    return link


def objective_value(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    stages: Sequence[Stage],
    *,
    chunk_tokens: int,
    microbatches: int,
) -> float:
    """The objective of a division in seconds (of one request, or per output token)."""
    steps = objective_steps(workload, chunk_tokens, microbatches)
    timings = plan_timings(model, cluster, stages, steps)
    return goal(workload, chunk_tokens, microbatches).value(timings.all)


def estimate(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    stages: Sequence[Stage],
    *,
    chunk_tokens: int,
    microbatches: int,
) -> Estimate:
    """TTFT is the mean over `concurrency` requests that arrive together and are prefilled in order."""
    steps = microbatch_steps(workload, chunk_tokens, microbatches)
    timings = plan_timings(model, cluster, stages, steps)
    num_chunks = len(steps.prefill)
    first_chunk_s = sum(timing.prefill_s for timing in timings.all) / num_chunks
    slowest_chunk_s = max(timing.prefill_s for timing in timings.all) / num_chunks
    decode_s = [timing.decode_s for timing in timings.all]
    tpot_s = max(microbatches * max(decode_s), sum(decode_s))
    prefill_s = first_chunk_s + (workload.concurrency * num_chunks - 1) * slowest_chunk_s
    mean_chunks = num_chunks * (workload.concurrency + 1) / 2
    total_s = prefill_s + (workload.output_tokens - 1) * tpot_s
    return Estimate(
        ttft_s=first_chunk_s + (mean_chunks - 1) * slowest_chunk_s,
        tpot_s=tpot_s,
        tokens_per_s=workload.concurrency * workload.output_tokens / total_s,
        stage_s=tuple(timing.decode_s for timing in timings.stages),
        link_s=tuple(timing.decode_s for timing in timings.hops),
        bottleneck=_bottleneck(stages, timings),
        uncertainty=uncertainty(cluster, stages, prefill_s / total_s),
    )


def _bottleneck(stages: Sequence[Stage], timings: Timings) -> str:
    names = [
        "the coordinator's link to the first stage",
        *(f"stage {index} ({'+'.join(stage.split.device_ids)})" for index, stage in enumerate(stages)),
        *(f"the link from stage {index} to {index + 1}" for index in range(len(stages) - 1)),
        "the last stage's link to the coordinator",
    ]
    slowest = max(range(len(names)), key=lambda index: timings.all[index].decode_s)
    return names[slowest]


def plan_estimate(plan: Plan) -> Estimate:
    return estimate(
        plan.model,
        plan.cluster,
        plan.workload,
        plan.stages,
        chunk_tokens=plan.chunk_tokens,
        microbatches=plan.microbatches,
    )


def plan_objective_value(plan: Plan) -> float:
    return objective_value(
        plan.model,
        plan.cluster,
        plan.workload,
        plan.stages,
        chunk_tokens=plan.chunk_tokens,
        microbatches=plan.microbatches,
    )


def estimate_times_s(figures: Estimate) -> tuple[float, ...]:
    """Stages and hops: a link is a stage too."""
    return (*figures.stage_s, *figures.link_s)
