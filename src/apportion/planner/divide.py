"""The best division for one prefill chunk and number of sequences, over the numbers of microbatches."""

from collections.abc import Sequence
from math import inf

from apportion.planner.found import Found
from apportion.planner.infeasible.error import least_bytes
from apportion.planner.named_stages import name_devices
from apportion.planner.problem import Problem, microbatch_candidates
from apportion.planner.search.division import Division, Group, Search, is_exact, possible_groups
from apportion.planner.search.limits import WithinLimits
from apportion.planner.stages.formats import group_problems, keeps_limits, widened
from apportion.planner.stages.kinds import StageKinds, kinds_of
from apportion.planner.stages.shares import GroupMemory
from apportion.types.errors import UsageError
from apportion.types.plan import Stage


def search(
    problem: Problem,
    microbatches: Sequence[int] | None = None,
    cutoff: float = inf,
    kinds: StageKinds | None = None,
) -> Found | None:
    """In one of these numbers of microbatches where they are given; only divisions below `cutoff`. `kinds` of the model
    may be known."""
    if not problem.streaming and least_bytes(problem) > sum(
        device.usable_bytes for device in problem.cluster.devices
    ):
        return None
    kinds = kinds or kinds_of(problem.model)
    groups = possible_groups(problem)
    _check_exact(problem, groups)
    memories = [
        [GroupMemory(one, group.devices, kinds) for one in group_problems(problem, group.devices, kinds)]
        for group in groups
    ]
    best: tuple[float, Division, int] | None = None
    for number in microbatches or microbatch_candidates(problem.workload, len(problem.cluster.devices)):
        searched = Search(problem, number, groups, memories, kinds)
        division = searched.best(cutoff)
        if division is None and cutoff == inf:
            return None  # memory and links do not depend on the number
        found = division and _limited(searched, division, number, cutoff)
        if found:
            best, cutoff = (*found, number), found[0]
    return None if best is None else _named(problem, best[1], best[2])


def _named(problem: Problem, division: Division, searched: int) -> Found:
    """Of so many microbatches, with real devices and the widest formats that are as good."""
    stages = name_devices(problem, division.stages)
    number = _microbatches(problem, stages, searched)
    stages = widened(problem, stages, number)
    value = problem.value(stages, number)
    return Found(problem=problem, stages=stages, microbatches=number, value=value)


def _check_exact(problem: Problem, groups: Sequence[Group]) -> None:
    """Raises UsageError for what only an exact search keeps to."""
    if is_exact(problem, groups):
        return
    number = len(problem.cluster.devices)
    if problem.max_devices is not None:
        raise UsageError(
            f"{number} devices are too many ways for --objective fewest-devices;"
            " name fewer, or use --objective throughput"
        )
    if problem.constraints.tied:
        raise UsageError(
            f"{number} devices are too many ways for --pin and --stage; give every layer a --stage, name fewer devices,"
            " or --exclude some"
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
    return min(range(1, most + 1), key=lambda microbatches: problem.estimate(stages, microbatches).tpot_s)
