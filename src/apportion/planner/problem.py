"""What is searched: one model, cluster and workload, with everything that the search holds fixed."""

from dataclasses import dataclass, replace

from apportion.cost.estimate import Steps, objective_steps
from apportion.cost.memory import Capacity, kv_blocks, messages_in_flight, plan_capacity
from apportion.cost.objective import Goal, goal, microbatch_sequences
from apportion.types.cluster import Cluster
from apportion.types.errors import ClusterError
from apportion.types.model import ModelSpec
from apportion.types.plan import Plan
from apportion.types.workload import Workload

BLOCK_TOKENS = 16
CHUNK_TOKENS = (256, 128, 64, 32, 16)
"""Prefill chunks, largest first."""
MAX_DEVICES_OF_ALL_CHUNKS = 6
"""With more devices only the largest chunk that fits is searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    model: ModelSpec
    cluster: Cluster
    workload: Workload
    weight_format: str
    capacity: Capacity

    def goal(self, microbatches: int) -> Goal:
        return goal(self.workload, self.capacity.chunk_tokens, microbatches)

    def steps(self, microbatches: int) -> Steps:
        return objective_steps(self.workload, self.capacity.chunk_tokens, microbatches)


def make_problem(
    model: ModelSpec, cluster: Cluster, workload: Workload, weight_format: str, chunk_tokens: int
) -> Problem:
    """Raises ClusterError where a device has no rate for the weight format."""
    for device in cluster.devices:
        if weight_format not in device.flops_per_s:
            known = ", ".join(sorted(device.flops_per_s))
            raise ClusterError(f"device {device.id} has no flops_per_s for '{weight_format}'; it has {known}")
    return Problem(
        model=model,
        cluster=cluster,
        workload=workload,
        weight_format=weight_format,
        capacity=Capacity(
            num_kv_blocks=kv_blocks(workload.concurrency, workload.max_context_tokens, BLOCK_TOKENS),
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=chunk_tokens,
            concurrency=workload.concurrency,
            max_context_tokens=workload.max_context_tokens,
            messages_in_flight=messages_in_flight(workload.concurrency, len(cluster.devices)),
        ),
    )


def chunk_candidates(max_context_tokens: int) -> tuple[int, ...]:
    return tuple(chunk for chunk in CHUNK_TOKENS if chunk <= max_context_tokens) or CHUNK_TOKENS[-1:]


def chunk_choices(workload: Workload, num_devices: int) -> tuple[int, ...]:
    """Chunks among which the best is chosen: with room for a token of every sequence, and of those that hold the
    whole prompt the smallest, as the others take as long and more memory."""
    largest, *others = chunk_candidates(workload.max_context_tokens)
    if num_devices > MAX_DEVICES_OF_ALL_CHUNKS:
        return (largest,)
    roomy = [chunk for chunk in (largest, *others) if chunk >= min(workload.concurrency, largest)]
    holding = [chunk for chunk in roomy if chunk >= workload.prompt_tokens]
    return tuple(chunk for chunk in roomy if chunk not in holding[:-1])


def alternatives(problem: Problem) -> tuple[Problem, ...]:
    """The problem with every chunk among which its own was chosen."""
    choices = chunk_choices(problem.workload, len(problem.cluster.devices))
    if problem.capacity.chunk_tokens not in choices:
        return (problem,)
    return tuple(
        replace(problem, capacity=replace(problem.capacity, chunk_tokens=chunk)) for chunk in choices
    )


def microbatch_candidates(workload: Workload, num_devices: int) -> tuple[int, ...]:
    """Under throughput 1..min(R, 2·devices), of those with equal microbatches only the fewest."""
    if workload.objective == "latency":
        return (1,)
    fewest: dict[int, int] = {}
    for microbatches in range(1, min(workload.concurrency, 2 * num_devices) + 1):
        fewest.setdefault(microbatch_sequences(workload.concurrency, microbatches), microbatches)
    return tuple(fewest.values())


def plan_problem(plan: Plan) -> Problem:
    """The problem that a plan answers, from the plan alone."""
    return Problem(
        model=plan.model,
        cluster=plan.cluster,
        workload=plan.workload,
        weight_format=plan.stages[0].weight_format,
        capacity=plan_capacity(plan),
    )
