"""What is searched: one model, cluster and workload, with everything that the search holds fixed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from apportion.cost.estimate import Steps, estimate, objective_steps, objective_value
from apportion.cost.formats import Formats, widest_first
from apportion.cost.memory import Capacity, kv_blocks, messages_in_flight, plan_capacity
from apportion.cost.objective import Goal, goal
from apportion.cost.traffic import with_each_coordinator
from apportion.types.cluster import Cluster
from apportion.types.constraints import UNCONSTRAINED, Constraints
from apportion.types.errors import ClusterError, UsageError
from apportion.types.model import ModelSpec
from apportion.types.plan import Estimate, Plan, Stage
from apportion.types.units import FORMAT_BYTES, KV_BITS, WEIGHT_BITS
from apportion.types.workload import Workload

BLOCK_TOKENS = 16
CHUNK_TOKENS = (256, 128, 64, 32, 16)
"""Prefill chunks, largest first."""
ALL_NUMBERS = 16
"""Of sequences, that are all tried where their number is to be chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    model: ModelSpec
    cluster: Cluster
    workload: Workload
    weight_formats: tuple[str, ...]
    """Those that stages may have, widest first."""
    activation_format: str
    kv_format: str
    capacity: Capacity
    streaming: bool = False
    """Whether stages may stream layers: asked for only where nothing fits otherwise."""
    max_devices: int | None = None
    """In use at once; None where there may be any number."""
    constraints: Constraints = UNCONSTRAINED
    any_coordinator: bool = False
    """For bounds on all hosts of the coordinator at once: each of its links is then as from the nearest."""

    @property
    def formats(self) -> Formats:
        """Of a problem with a single weight format."""
        (weight_format,) = self.weight_formats
        return Formats(weights=weight_format, activations=self.activation_format, kv=self.kv_format)

    def with_each_coordinator(self) -> tuple["Problem", ...]:
        return tuple(replace(self, cluster=cluster) for cluster in with_each_coordinator(self.cluster))

    def in_format(self, weight_format: str) -> "Problem":
        return replace(self, weight_formats=(weight_format,))

    def narrowest(self) -> "Problem":
        return self.in_format(self.weight_formats[-1])

    def goal(self, microbatches: int) -> Goal:
        return goal(self.workload, self.capacity.chunk_tokens, microbatches)

    def steps(self, microbatches: int) -> Steps:
        return objective_steps(self.workload, self.capacity.chunk_tokens, microbatches)

    def value(self, stages: Sequence[Stage], microbatches: int) -> float:
        """The objective of a division, in seconds."""
        return objective_value(
            self.model,
            self.cluster,
            self.workload,
            stages,
            chunk_tokens=self.capacity.chunk_tokens,
            microbatches=microbatches,
        )

    def estimate(self, stages: Sequence[Stage], microbatches: int) -> Estimate:
        """What a user sees of a division."""
        return estimate(
            self.model,
            self.cluster,
            self.workload,
            stages,
            chunk_tokens=self.capacity.chunk_tokens,
            microbatches=microbatches,
        )


def make_problem(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    chunk_tokens: int,
    constraints: Constraints = UNCONSTRAINED,
) -> Problem:
    """Raises ClusterError where a device has no rate for any of the weight formats, UsageError for a format of keys and
    values that the devices do not hold."""
    for device in cluster.devices:
        if all(device.rate(name) is None for name in weight_formats):
            known, wanted = ", ".join(sorted(device.flops_per_s)), "' or '".join(weight_formats)
            raise ClusterError(f"device {device.id} has no flops_per_s for '{wanted}'; it has {known}")
    activations = activation_format(model, cluster, weight_formats)
    held = kv_format(cluster, workload, weight_formats, activations)
    if workload.kv_format not in (None, held):
        engines = ", ".join(name for name in KV_BITS if name not in FORMAT_BYTES)
        raise UsageError(
            f"--kv-format {workload.kv_format} is for CPUs alone; beside GPUs keys and values are in {held}, as the"
            f" hidden states, or for other engines in {engines}"
        )
    return Problem(
        model=model,
        cluster=cluster,
        workload=workload,
        weight_formats=widest_first(model, weight_formats),
        activation_format=activations,
        kv_format=held,
        capacity=Capacity(
            num_kv_blocks=kv_blocks(workload, BLOCK_TOKENS),
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=chunk_tokens,
            concurrency=workload.concurrency,
            max_context_tokens=workload.max_context_tokens,
            messages_in_flight=messages_in_flight(workload.concurrency, len(cluster.devices)),
            window_extra_tokens=workload.window_extra_tokens,
            embedding_on_host=constraints.embedding_on_host,
        ),
        constraints=constraints,
    )


def activation_format(model: ModelSpec, cluster: Cluster, weight_formats: tuple[str, ...]) -> str:
    """fp32 where all devices are CPUs, whose kernels here take it (weights as stored are for other engines); else as
    the widest weights, where these are not quantised, else the model's own 16 bits (fp16 on cards older than bf16)."""
    stored = all(name not in WEIGHT_BITS for name in weight_formats)
    if not stored and all(device.kind == "cpu" for device in cluster.devices):
        return "fp32"
    widest = next((name for name in FORMAT_BYTES if name in weight_formats), None)
    if widest is not None:
        return widest
    half = "bf16" if model.checkpoint_format == "fp32" else model.checkpoint_format
    known = all(half in device.flops_per_s for device in cluster.devices if device.kind != "cpu")
    return half if known else "fp16"


def kv_format(cluster: Cluster, workload: Workload, weight_formats: tuple[str, ...], activations: str) -> str:
    """As activations, but where all devices are CPUs what is asked for, or else as the widest weights, and fp16 where
    these are quantised: half the memory, and half the time of reading it. Quantised ones, which other engines hold,
    on any device."""
    if workload.kv_format is not None and workload.kv_format not in FORMAT_BYTES:
        return workload.kv_format
    if any(device.kind != "cpu" for device in cluster.devices):
        return activations
    if workload.kv_format is not None:
        return workload.kv_format
    if all(name not in WEIGHT_BITS for name in weight_formats):
        return activations
    return next((name for name in FORMAT_BYTES if name in weight_formats), "fp16")


def chunk_candidates(max_context_tokens: int) -> tuple[int, ...]:
    return tuple(chunk for chunk in CHUNK_TOKENS if chunk <= max_context_tokens) or CHUNK_TOKENS[-1:]


def useful_chunks(workload: Workload) -> tuple[int, ...]:
    """Of those that hold the whole prompt the smallest, as the others take as long and more memory."""
    candidates = chunk_candidates(workload.max_context_tokens)
    holding = [chunk for chunk in candidates if chunk >= workload.prompt_tokens]
    return tuple(chunk for chunk in candidates if chunk not in holding[:-1])


def sequence_numbers(most: int) -> tuple[int, ...]:
    """How many may run at once: all up to `ALL_NUMBERS`; of more about so many, in equal ratios."""
    if most <= ALL_NUMBERS:
        return tuple(range(1, most + 1))
    return tuple(dict.fromkeys(round(most ** (step / ALL_NUMBERS)) for step in range(ALL_NUMBERS + 1)))


def alternatives(problem: Problem) -> tuple[Problem, ...]:
    """The problem with every chunk, coordinator's host, and the least and the most sequences, among which its own were
    chosen."""
    choices = useful_chunks(problem.workload)
    if problem.capacity.chunk_tokens not in choices:
        choices = (problem.capacity.chunk_tokens,)
    most = problem.workload.most_sequences
    return tuple(
        with_sequences(one, chunk, sequences)
        for one in problem.with_each_coordinator()
        for chunk in choices
        for sequences in ((1, most) if most else (problem.workload.concurrency,))
    )


def with_sequences(problem: Problem, chunk_tokens: int, sequences: int) -> Problem:
    if sequences == problem.workload.concurrency:
        return replace(problem, capacity=replace(problem.capacity, chunk_tokens=chunk_tokens))
    workload = replace(problem.workload, concurrency=sequences)
    fresh = make_problem(problem.model, problem.cluster, workload, problem.weight_formats, chunk_tokens)
    return replace(
        fresh,
        activation_format=problem.activation_format,
        kv_format=problem.kv_format,
        streaming=problem.streaming,
        max_devices=problem.max_devices,
        constraints=problem.constraints,
    )


def microbatch_candidates(workload: Workload, num_devices: int) -> tuple[int, ...]:
    """Under throughput all for which there are sequences, and messages in the memory (`messages_in_flight`)."""
    if workload.objective == "latency":
        return (1,)
    return tuple(range(1, min(workload.concurrency, 2 * num_devices) + 1))


def plan_problem(plan: Plan) -> Problem:
    """The problem that a plan answers, from the plan alone: its KV cache may be larger than what was asked for."""
    return Problem(
        model=plan.model,
        cluster=plan.cluster,
        workload=plan.workload,
        weight_formats=plan.weight_formats,
        activation_format=plan.activation_format,
        kv_format=plan.kv_format,
        max_devices=len(plan.device_ids) if plan.workload.objective == "fewest-devices" else None,
        capacity=replace(
            plan_capacity(plan),
            num_kv_blocks=kv_blocks(plan.workload, plan.block_tokens),
            messages_in_flight=messages_in_flight(plan.workload.concurrency, len(plan.cluster.devices)),
        ),
        streaming=any(stage.streamed_layers for stage in plan.stages),
        constraints=plan.constraints,
    )
