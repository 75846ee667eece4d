"""What a given division comes to: its objective and estimate, if memory and links allow it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from apportion.cost.memory import stages_memory
from apportion.cost.service import within_limits
from apportion.cost.traffic import coordinator_host, host_link
from apportion.planner.build import find_division
from apportion.planner.problem import Problem, microbatch_candidates
from apportion.types.cluster import Cluster
from apportion.types.constraints import UNCONSTRAINED, Constraints
from apportion.types.errors import InfeasibleError
from apportion.types.model import ModelSpec
from apportion.types.plan import Estimate, Stage
from apportion.types.units import format_bytes
from apportion.types.workload import Workload

FREE = ("latency", "communication")
"""Objectives of one request, or of one step: the number of microbatches does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Stages and what they are predicted to do; `value` is the objective in seconds."""

    stages: tuple[Stage, ...]
    chunk_tokens: int
    microbatches: int
    value: float
    estimate: Estimate

    @property
    def device_ids(self) -> frozenset[str]:
        return frozenset(device_id for stage in self.stages for device_id in stage.split.device_ids)


def best_division(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    constraints: Constraints = UNCONSTRAINED,
) -> Division | None:
    """The planner's, without its certificate; None where nothing fits."""
    try:
        found = find_division(model, cluster, workload, weight_formats, constraints)
    except InfeasibleError:
        return None
    return None if found is None else weigh(found.problem, found.stages)


def weigh(problem: Problem, stages: tuple[Stage, ...]) -> Division:
    """Takes the microbatches with the least objective; where they do not count, the least TPOT.

    Raises InfeasibleError where memory or a link is missing, or a limit broken.
    """
    _check_memory(problem, stages)
    _check_links(problem.cluster, stages)
    weighed = [_division(problem, stages, number) for number in _microbatches(problem, stages)]
    weighed = [one for one in weighed if within_limits(problem.workload, one.estimate)]
    if not weighed:
        raise InfeasibleError("it breaks a limit on TTFT or TPOT")
    if problem.workload.objective not in FREE:
        return min(weighed, key=lambda division: division.value)
    return min(weighed, key=lambda division: division.estimate.tpot_s)


def _microbatches(problem: Problem, stages: Sequence[Stage]) -> Sequence[int]:
    if problem.workload.objective not in FREE:
        return microbatch_candidates(problem.workload, len(problem.cluster.devices))
    return range(1, min(problem.workload.concurrency, 2 * len(stages)) + 1)


def _division(problem: Problem, stages: tuple[Stage, ...], microbatches: int) -> Division:
    return Division(
        stages=stages,
        chunk_tokens=problem.capacity.chunk_tokens,
        microbatches=microbatches,
        value=problem.value(stages, microbatches),
        estimate=problem.estimate(stages, microbatches),
    )


def _check_memory(problem: Problem, stages: Sequence[Stage]) -> None:
    memory = stages_memory(problem.model, problem.cluster, stages, problem.capacity)
    beyond = {
        name: used.total_bytes - problem.cluster.device(name).memory_bytes for name, used in memory.items()
    }
    worst = max(beyond, key=lambda name: beyond[name])
    if beyond[worst] > 0:
        has = problem.cluster.device(worst).memory_bytes
        raise InfeasibleError(
            f"{worst} needs {format_bytes(memory[worst].total_bytes)}, has {format_bytes(has)}"
        )


def _check_links(cluster: Cluster, stages: Sequence[Stage]) -> None:
    home = coordinator_host(cluster)
    hosts = [home, *(cluster.device(stage.split.device_ids[0]).host for stage in stages), home]
    inside = [(hosts[number + 1],) * 2 for number, stage in enumerate(stages) if stage.split.size > 1]
    for src, dst in (*inside, *pairwise(hosts)):
        if host_link(cluster, src, dst) is None:
            raise InfeasibleError(f"there is no link between {src} and {dst}")
