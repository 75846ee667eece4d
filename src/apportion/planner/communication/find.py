"""The division with the least communication, and what is left to choose beside it."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, floor, inf, log10, sqrt

from apportion.cost.estimate import microbatch_steps, stage_timing
from apportion.cost.memory import stages_memory
from apportion.cost.statements import epsilon_s
from apportion.planner.communication.bound import CommunicationBound, Proven
from apportion.planner.communication.search import LeastCommunication
from apportion.planner.communication.tables import LinkTables
from apportion.planner.communication.window import keeps_balance
from apportion.planner.found import Found
from apportion.planner.named_stages import name_devices
from apportion.planner.problem import Problem, chunk_candidates
from apportion.planner.search.division import PlacedStage
from apportion.planner.search.selection import num_states
from apportion.planner.stages.groups import Group, device_axes, possible_groups
from apportion.types.errors import InfeasibleError, UsageError
from apportion.types.plan import Stage
from apportion.types.units import format_seconds
from apportion.types.workload import BalanceLimit

MAX_WAYS = 20_000
"""Of adding a group to a state: beyond, a window takes longer than about half a second."""
CLOSE = 1.01
"""How near the smallest ε is looked for."""
UNLIMITED = BalanceLimit(seconds=inf)


def with_least_memory(problem: Problem) -> Problem:
    """In the smallest prefill chunk: a decode step takes the same with all, and no other needs less memory."""
    chunk = chunk_candidates(problem.workload.max_context_tokens)[-1]
    return replace(problem, capacity=replace(problem.capacity, chunk_tokens=chunk))


def least_communication(problems: Sequence[Problem]) -> Found | None:
    """Of problems that differ in their coordinator's host; None where nothing fits. Raises InfeasibleError where no
    division keeps the balance, UsageError for more devices than can be searched."""
    problems = [with_least_memory(problem) for problem in problems]
    searches = [LeastCommunication(LinkTables(one, _searched_groups(one))) for one in problems]
    limit = problems[0].workload.balance
    placed = [search.best(limit or UNLIMITED) for search in searches]
    found = [_found(one, stages) for one, stages in zip(problems, placed, strict=True) if stages is not None]
    if found or limit is None:
        return min(found, key=lambda one: one.value, default=None)
    for problem, search in zip(problems, searches, strict=True):
        if search.best(UNLIMITED) is not None:
            raise _unbalanced(problem, search, limit)
    return None


def prove_communication(problem: Problem, value: float) -> Proven:
    """A bound on the communication of every division, by a method of its own; `value` is that of one."""
    problem = with_least_memory(problem)
    tables = LinkTables(problem, possible_groups(problem))
    return CommunicationBound(tables, value).prove(problem.workload.balance)


def _searched_groups(problem: Problem) -> Sequence[Group]:
    """All, or where these are too many ways those of at most two, or one."""
    groups = possible_groups(problem)
    states = num_states(device_axes(problem).available)
    laid = {frozenset(one.device_ids) for one in problem.constraints.stages}
    for most in (len(problem.cluster.devices), 2, 1):
        searched = [
            group
            for group in groups
            if group.size <= most or frozenset(device.id for device in group.devices) in laid
        ]
        if states * len(searched) <= MAX_WAYS:
            return searched
    raise UsageError(
        f"{len(problem.cluster.devices)} devices are too many ways for --objective communication;"
        " name fewer, or use --objective latency"
    )


def _found(problem: Problem, placed: Sequence[PlacedStage]) -> Found:
    stages = name_devices(problem, placed)
    number = min(_microbatches(problem, stages), key=lambda number: problem.estimate(stages, number).tpot_s)
    chunks = chunk_candidates(problem.workload.max_context_tokens)
    in_chunks = [replace(problem, capacity=replace(problem.capacity, chunk_tokens=chunk)) for chunk in chunks]
    fastest = min(
        (one for one in in_chunks if _fits(one, stages)),
        key=lambda one: one.estimate(stages, number).ttft_s,
    )
    value = fastest.value(stages, number)
    return Found(problem=fastest, stages=stages, microbatches=number, value=value)


def _fits(problem: Problem, stages: Sequence[Stage]) -> bool:
    needed = stages_memory(problem.model, problem.cluster, stages, problem.capacity)
    return all(
        memory.total_bytes <= problem.cluster.device(device_id).memory_bytes
        for device_id, memory in needed.items()
    )


def _microbatches(problem: Problem, stages: Sequence[Stage]) -> list[int]:
    """The numbers in which the stages keep the balance too; in one they do."""
    most = min(problem.workload.concurrency, 2 * len(stages))
    return [1, *(number for number in range(2, most + 1) if balanced_in(problem, stages, number))]


def balanced_in(problem: Problem, stages: Sequence[Stage], microbatches: int) -> bool:
    """Whether the stages' times of one microbatch keep the balance."""
    steps = microbatch_steps(problem.workload, problem.capacity.chunk_tokens, microbatches)
    decoding = replace(steps, prefill=())
    times_s = [stage_timing(problem.model, problem.cluster, stage, decoding).decode_s for stage in stages]
    return keeps_balance(times_s, problem.workload.balance)


def _unbalanced(problem: Problem, search: LeastCommunication, limit: BalanceLimit) -> InfeasibleError:
    """With the smallest ε that any division keeps, by halving between what none does and what one does."""
    in_part = limit.seconds is None
    excluded = (limit.of_mean or 0.0) if limit.seconds is None else limit.seconds
    times_s = search.times_of_best(UNLIMITED)
    while (reached := _epsilon(times_s, in_part=in_part)) > excluded * CLOSE:
        middle = sqrt(reached * excluded)
        closer = search.times_of_best(_limit(middle, in_part=in_part))
        if not closer:
            excluded = middle
        else:
            times_s = closer if _epsilon(closer, in_part=in_part) < reached else times_s
    mean_s = sum(times_s) / len(times_s)
    by_s, by_part = _epsilon(times_s, in_part=False), _epsilon(times_s, in_part=True)
    found = f"{_up(by_part * 100)}% of their mean, {format_seconds(by_s)} of {format_seconds(mean_s)}"
    ask = f"{_up(by_part * 100)}%" if in_part else f"{_up(by_s * 1e3)}ms"
    lighter = ", or leave out --use-all" if problem.constraints.use_all else ""
    return InfeasibleError(
        f"no division keeps every stage's step within {said(limit)} of the mean; the nearest found keeps"
        f" {found}: ask for --balance {ask}{lighter}"
    )


def said(limit: BalanceLimit) -> str:
    return f"{(limit.of_mean or 0) * 100:g}%" if limit.seconds is None else format_seconds(limit.seconds)


def _limit(epsilon: float, *, in_part: bool) -> BalanceLimit:
    return BalanceLimit(of_mean=epsilon) if in_part else BalanceLimit(seconds=epsilon)


def _epsilon(times_s: Sequence[float], *, in_part: bool) -> float:
    return epsilon_s(times_s) / (sum(times_s) / len(times_s) if in_part else 1)


def _up(figure: float) -> str:
    """To three digits, rounded up."""
    unit = 10.0 ** (floor(log10(figure)) - 2)
    return f"{ceil(figure / unit) * unit:.6g}"
