"""From stages to seconds: each stage's and link's time, and what a user sees of them (TTFT, TPOT, tokens/s)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from apportion.cost.group_step import group_exchange_s, group_step_s, members_at_work, stage_members
from apportion.cost.objective import Timing, goal, microbatch_sequences, serving
from apportion.cost.roofline import (
    AnyStep,
    MixedStep,
    Step,
    decode_step,
    prefill_steps,
)
from apportion.cost.shard import stage_shards
from apportion.cost.traffic import (
    ID_BYTES,
    coordinator_host,
    group_link,
    hop_bytes,
    host_link,
)
from apportion.cost.uncertainty import uncertainty
from apportion.types.cluster import Cluster, Link
from apportion.types.errors import PlanError
from apportion.types.model import ModelSpec
from apportion.types.plan import Estimate, Plan, Stage
from apportion.types.units import FORMAT_BYTES
from apportion.types.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The steps that a workload consists of."""

    prefill: tuple[AnyStep, ...]
    """A prompt's chunks, each with the tokens of the sequences that decode beside it."""
    decode: AnyStep
    overlapping: bool = False
    """Whether other stages are at work meanwhile, as where several microbatches are under way."""

    def timing(self, seconds: Callable[[AnyStep], float]) -> Timing:
        return Timing(prefill_s=sum(seconds(step) for step in self.prefill), decode_s=seconds(self.decode))


def workload_steps(
    workload: Workload, chunk_tokens: int, sequences: int, *, beside: int = 0, overlapping: bool = False
) -> Steps:
    prompt, output = workload.prompt_tokens, workload.output_tokens
    chunks: tuple[AnyStep, ...] = prefill_steps(prompt, chunk_tokens)
    if beside:
        chunks = tuple(MixedStep(steps=(chunk, decode_step(beside, prompt, output))) for chunk in chunks)
    return Steps(
        prefill=chunks,
        decode=decode_step(sequences, prompt, output),
        overlapping=overlapping,
    )


def microbatch_steps(workload: Workload, chunk_tokens: int, microbatches: int) -> Steps:
    """All sequences running, shared out among the microbatches."""
    return workload_steps(
        workload,
        chunk_tokens,
        microbatch_sequences(workload.concurrency, microbatches),
        beside=int(serving(workload, chunk_tokens, microbatches).beside),
        overlapping=microbatches > 1,
    )


def objective_steps(workload: Workload, chunk_tokens: int, microbatches: int) -> Steps:
    """The steps the objective counts: one request alone under latency, a full microbatch under throughput."""
    if workload.objective == "latency":
        return workload_steps(workload, chunk_tokens, 1)
    return microbatch_steps(workload, chunk_tokens, microbatches)


def least_steps(workload: Workload, chunk_tokens: int, microbatches: tuple[int, int]) -> Steps:
    """That take no longer than those of any number of microbatches from the first to the second: the smallest
    microbatches, the fewest sequences beside a chunk, and where the first is one no other stage at work."""
    few, many = microbatches
    if few == many or workload.objective == "latency":
        return objective_steps(workload, chunk_tokens, few)
    beside = min(int(serving(workload, chunk_tokens, number).beside) for number in range(few, many + 1))
    return workload_steps(
        workload,
        chunk_tokens,
        microbatch_sequences(workload.concurrency, many),
        beside=beside,
        overlapping=few > 1,
    )


def hop_timing(model: ModelSpec, link: Link, group_size: int, steps: Steps, activation_format: str) -> Timing:
    """Hidden states to a stage of `group_size`; its copies share the link."""
    element_bytes = FORMAT_BYTES[activation_format]
    return steps.timing(
        lambda step: link.hop_seconds(hop_bytes(model, group_size, step.tokens, element_bytes))
    )


def entry_timing(link: Link, group_size: int, steps: Steps) -> Timing:
    """Token ids from the coordinator to each rank of the first stage."""
    return steps.timing(lambda step: link.hop_seconds(group_size * step.tokens * ID_BYTES))


def exit_timing(link: Link, steps: Steps) -> Timing:
    """A result to the coordinator after every step."""
    return steps.timing(lambda step: link.hop_seconds(step.sampled_rows * ID_BYTES))


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
    """The objective of a division in seconds (of one request, per output token, or on links in a step)."""
    if workload.objective == "communication":
        return communication(model, cluster, workload, stages).total_s
    steps = objective_steps(workload, chunk_tokens, microbatches)
    timings = plan_timings(model, cluster, stages, steps)
    return goal(workload, chunk_tokens, microbatches).value(timings.all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """Seconds on links in a decode step of all sequences at once."""

    coordinator_s: float
    """Token ids to the first stage, and back from the last."""
    hops_s: float
    """Hidden states between stages."""
    groups_s: float
    """Partial sums inside groups, and the gathering of logits."""

    @property
    def total_s(self) -> float:
        return self.coordinator_s + self.hops_s + self.groups_s


def communication_steps(workload: Workload) -> Steps:
    """One decode step of all sequences; no other stage is at work meanwhile."""
    step = decode_step(workload.concurrency, workload.prompt_tokens, workload.output_tokens)
    return Steps(prefill=(), decode=step)


def communication(
    model: ModelSpec, cluster: Cluster, workload: Workload, stages: Sequence[Stage]
) -> Communication:
    steps = communication_steps(workload)
    timings = plan_timings(model, cluster, stages, steps)
    return Communication(
        coordinator_s=timings.entry.decode_s + timings.exit.decode_s,
        hops_s=sum(hop.decode_s for hop in timings.hops),
        groups_s=sum(
            group_exchange_s(
                model, stage_shards(model, stage), group_link(cluster, stage.split.device_ids), steps.decode
            )
            for stage in stages
        ),
    )


def whole_step_s(
    model: ModelSpec, cluster: Cluster, workload: Workload, stages: Sequence[Stage]
) -> tuple[float, ...]:
    """By stage, the time of that same step, reductions inside the group included."""
    steps = communication_steps(workload)
    return tuple(stage_timing(model, cluster, stage, steps).decode_s for stage in stages)


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
    tpot_s = _round_s(timings, microbatches)
    prefill_s = first_chunk_s + (workload.concurrency * num_chunks - 1) * slowest_chunk_s
    mean_chunks = num_chunks * (workload.concurrency + 1) / 2
    drawing = _mean_drawing(workload, num_chunks, microbatches)
    rest_s = plan_timings(model, cluster, stages, replace(steps, prefill=(), decode=drawing))
    total_s = prefill_s + (workload.output_tokens - 1) * _round_s(rest_s, microbatches)
    return Estimate(
        ttft_s=first_chunk_s + (mean_chunks - 1) * slowest_chunk_s,
        tpot_s=tpot_s,
        tokens_per_s=workload.concurrency * workload.output_tokens / total_s,
        stage_s=tuple(timing.decode_s for timing in timings.stages),
        link_s=tuple(timing.decode_s for timing in timings.hops),
        bottleneck=_bottleneck(stages, timings),
        uncertainty=uncertainty(cluster, stages, prefill_s / total_s),
    )


def _round_s(timings: Timings, microbatches: int) -> float:
    """One token of every sequence."""
    decode_s = [timing.decode_s for timing in timings.all]
    return max(microbatches * max(decode_s), sum(decode_s))


def _mean_drawing(workload: Workload, num_chunks: int, microbatches: int) -> Step:
    """A microbatch of as many as still draw, on average, once all prompts are through: the first to begin, which have
    drawn a token with every P + 1 chunks since (see cost/objective.py), are the first to end."""
    output, others = workload.output_tokens, workload.concurrency - 1
    ahead = others * num_chunks / (microbatches + 1)
    left = 1 - ahead / (2 * output) if ahead < output else output / (2 * ahead)
    sequences = max(1, round(left * microbatch_sequences(workload.concurrency, microbatches)))
    return decode_step(sequences, workload.prompt_tokens, output)


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
