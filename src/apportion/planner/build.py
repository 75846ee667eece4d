"""From model, cluster and workload to a plan: search, then estimate, certify and check the balance."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf

from apportion.cost.estimate import estimate, objective_value
from apportion.cost.memory import stages_memory
from apportion.planner.balance import balance
from apportion.planner.bound import certify
from apportion.planner.demand import find_demanded
from apportion.planner.formats import group_problems, keeps_limits, widened
from apportion.planner.found import Found
from apportion.planner.infeasible import infeasible_error, least_bytes
from apportion.planner.limits import WithinLimits
from apportion.planner.limits_error import limits_error, without_limits
from apportion.planner.named_stages import name_devices
from apportion.planner.problem import (
    Problem,
    alternatives,
    chunk_candidates,
    chunk_choices,
    make_problem,
    microbatch_candidates,
)
from apportion.planner.relief import Demand
from apportion.planner.search import (
    Division,
    Search,
    StageKinds,
    possible_groups,
)
from apportion.planner.shares import GroupMemory
from apportion.types.cluster import Cluster, Device
from apportion.types.errors import UsageError
from apportion.types.model import ModelSpec
from apportion.types.plan import PLAN_VERSION, Plan, Stage
from apportion.types.workload import Workload


def find_division(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    *,
    streaming: bool = True,
) -> Found | None:
    """The best division that holds all its weights; where there is none and `streaming` is allowed, the best of those
    that stream some, in one weight format. None where nothing fits or keeps the limits. Raises InfeasibleError for an
    arrival rate that cannot be served."""

    def find(streaming: bool) -> Found | None:
        def of_sequences(resolved: Workload, most_devices: int | None) -> Found | None:
            return _over_chunks(model, cluster, resolved, weight_formats, most_devices, streaming=streaming)

        return find_demanded(workload, len(cluster.devices), of_sequences)

    held = find(False)
    return find(True) if held is None and streaming else held


def _over_chunks(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    most_devices: int | None,
    *,
    streaming: bool,
) -> Found | None:
    """The best over the prefill chunks to choose among."""

    def with_chunk(chunk_tokens: int) -> Found | None:
        problem = make_problem(model, cluster, workload, weight_formats, chunk_tokens)
        problem = replace(problem, max_devices=most_devices)
        if not streaming:
            return search(problem)
        if problem.activation_format not in problem.weight_formats:
            return None
        return search(_streaming(problem))

    choices = chunk_choices(workload, len(cluster.devices))
    found = [one for chunk_tokens in choices if (one := with_chunk(chunk_tokens))]
    if found:
        return min(found, key=lambda one: one.value)
    others = [chunk for chunk in chunk_candidates(workload.max_context_tokens) if chunk not in choices]
    # Memory falls with the chunk: what the smallest does not allow, none does.
    if not others or with_chunk(others[-1]) is None:
        return None
    return next((one for chunk_tokens in others if (one := with_chunk(chunk_tokens))), None)


def fits(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    *,
    streaming: bool = True,
) -> bool:
    """Whether any division holds this workload, however slow."""
    chunk_tokens = chunk_candidates(workload.max_context_tokens)[-1]
    alone = replace(
        workload,
        objective="latency",
        prompt_tokens=1,
        output_tokens=1,
        arrival_rate=None,
        ttft_limit_s=None,
        tpot_limit_s=None,
    )
    problem = make_problem(model, cluster, alone, weight_formats, chunk_tokens)
    if search(problem) is not None:
        return True
    if not streaming or problem.activation_format not in problem.weight_formats:
        return False
    return search(_streaming(problem)) is not None


def _streaming(problem: Problem) -> Problem:
    """Layers are streamed as they are used, so in the activations' format."""
    return replace(problem.in_format(problem.activation_format), streaming=True)


def search(problem: Problem) -> Found | None:
    if not problem.streaming and least_bytes(problem) > sum(
        device.usable_bytes for device in problem.cluster.devices
    ):
        return None
    kinds = StageKinds(problem.model)
    groups = possible_groups(problem)
    memories = [
        [GroupMemory(one, group.devices, kinds) for one in group_problems(problem, group.devices, kinds)]
        for group in groups
    ]
    best: tuple[float, Division, int] | None = None
    for microbatches in microbatch_candidates(problem.workload, len(problem.cluster.devices)):
        searched = Search(problem, microbatches, groups, memories, kinds)
        division = searched.best()
        if division is None:
            return None
        _check_exact(problem, searched)
        found = _limited(searched, division, microbatches, inf if best is None else best[0])
        if found is not None and (best is None or found[0] < best[0]):
            best = (*found, microbatches)
    if best is None:
        return None
    stages = name_devices(problem, best[1].stages)
    microbatches = _microbatches(problem, stages, best[2])
    stages = widened(problem, stages, microbatches)
    value = objective_value(
        problem.model,
        problem.cluster,
        problem.workload,
        stages,
        chunk_tokens=problem.capacity.chunk_tokens,
        microbatches=microbatches,
    )
    return Found(problem=problem, stages=stages, microbatches=microbatches, value=value)


def _check_exact(problem: Problem, searched: Search) -> None:
    if problem.max_devices is not None and not searched.exact:
        raise UsageError(
            f"{len(problem.cluster.devices)} devices are too many ways for --objective fewest-devices;"
            " name fewer, or use --objective throughput"
        )


def _limited(
    searched: Search, division: Division, microbatches: int, cutoff: float
) -> tuple[float, Division] | None:
    """The division and its value where that is below `cutoff` and it keeps the limits; else the best that does both."""
    problem = searched.problem
    value = searched.goal.combine(division.total, division.maximum)
    if value >= cutoff:
        return None
    if keeps_limits(problem, name_devices(problem, division.stages), microbatches):
        return value, division
    exact = searched.exact and not problem.streaming
    other = WithinLimits(searched, microbatches, cutoff).best() if exact else None
    return None if other is None else (searched.goal.combine(other.total, other.maximum), other)


def _microbatches(problem: Problem, stages: Sequence[Stage], searched: int) -> int:
    """Latency is of one request alone, so the number is free: the one with the least time per output token."""
    if problem.workload.objective != "latency":
        return searched
    most = min(problem.workload.concurrency, 2 * len(stages))

    def tpot_s(microbatches: int) -> float:
        return estimate(
            problem.model,
            problem.cluster,
            problem.workload,
            stages,
            chunk_tokens=problem.capacity.chunk_tokens,
            microbatches=microbatches,
        ).tpot_s

    return min(range(1, most + 1), key=tpot_s)


def _found(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    cards: Sequence[Device],
    *,
    streaming: bool,
) -> Found:
    """Raises InfeasibleError for what stands in the way: limits, or memory."""
    found = find_division(model, cluster, workload, weight_formats, streaming=streaming)
    if found is None and workload.limited:
        free = without_limits(workload)
        unlimited = find_division(model, cluster, free, weight_formats, streaming=streaming)
        if unlimited is not None:
            raise limits_error(workload, unlimited)
    if found is None:
        raise infeasible_error(
            Demand(
                model=model,
                cluster=cluster,
                workload=workload,
                weight_formats=weight_formats,
                fits=partial(fits, streaming=streaming),
                fits_streamed=None if streaming else partial(fits, streaming=True),
                cards=cards,
            )
        )
    return found


def make_plan(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    *,
    streaming: bool = True,
    cards: Sequence[Device] = (),
) -> Plan:
    """The best division of the model, certified. Layers are streamed where nothing fits otherwise and `streaming`.
    `cards` are those that an error may advise to add, smallest first.

    Raises InfeasibleError where the devices cannot hold it, or keep its limits; ClusterError where one lacks a rate it
    needs.
    """
    found = _found(model, cluster, workload, weight_formats, cards, streaming=streaming)
    problem, stages, workload = found.problem, found.stages, found.problem.workload
    chunk_tokens = problem.capacity.chunk_tokens
    predicted = estimate(
        model, cluster, workload, stages, chunk_tokens=chunk_tokens, microbatches=found.microbatches
    )
    return Plan(
        version=PLAN_VERSION,
        model=model,
        cluster=cluster,
        workload=workload,
        weight_formats=problem.weight_formats,
        stages=stages,
        memory=stages_memory(model, cluster, stages, problem.capacity),
        block_tokens=problem.capacity.block_tokens,
        num_kv_blocks=problem.capacity.num_kv_blocks,
        microbatches=found.microbatches,
        chunk_tokens=chunk_tokens,
        estimate=predicted,
        certificate=certify(alternatives(problem), found.value),
        balance=balance(problem, stages, found.microbatches),
    )
