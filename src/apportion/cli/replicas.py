"""Plans of several replicas from the command line."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from apportion.cli.asked import ask, plan_asked, with_swap_space
from apportion.cli.options import PlanChoices
from apportion.types.errors import InfeasibleError, UsageError

if TYPE_CHECKING:
    from apportion.catalog.described import Description
    from apportion.planner.plan_file import Planned
    from apportion.types.model import ModelSpec
    from apportion.types.plan import Plan


def number_asked(text: str | None) -> int | None:
    """1 where nothing is asked for, None for 'auto'. Raises UsageError."""
    if text == "auto":
        return None
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"--replicas '{text}': write a number from 1, or auto")
    return 1 if text is None else int(text)


def refuse_beside(*, compare: bool, why: bool) -> None:
    """Raises UsageError for what is said of one pipeline alone."""
    if compare or why:
        name = "--compare" if compare else "--why"
        raise UsageError(f"{name} is about one pipeline; leave out --replicas, or {name}")


def planned_replicas(
    source: "Path | Description",
    choices: PlanChoices,
    number: int | None,
    when_measured: Callable[["ModelSpec"], None] = lambda _: None,
) -> "Planned":
    """The ordinary plan for one replica, and where any number will do and none holds all its weights.

    Raises UsageError, InfeasibleError."""
    asked = ask(source, choices, when_measured)
    if number == 1:
        return plan_asked(asked, choices)
    from apportion.planner.replicas.build import check_workload, make_replicated_plan

    check_workload(asked.workload, number)
    try:
        plan = make_replicated_plan(
            asked.model, asked.cluster, asked.workload, asked.weight_formats, number, asked.constraints
        )
    except InfeasibleError:
        if number is not None:
            raise
        return plan_asked(asked, choices)
    swapping = [with_swap_space(replica, asked.swap_bytes) for replica in plan.replicas]
    return replace(plan, replicas=tuple(swapping))


def pictures(plan: "Planned", path: Path) -> "Iterator[tuple[Plan, Path]]":
    """Every pipeline and the file it is drawn to: of several replicas plan-0.svg, plan-1.svg, …"""
    from apportion.types.replicated import ReplicatedPlan

    if not isinstance(plan, ReplicatedPlan):
        yield plan, path
    else:
        for number, replica in enumerate(plan.replicas):
            yield replica, path.with_stem(f"{path.stem}-{number}")
