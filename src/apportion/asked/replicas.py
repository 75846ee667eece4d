"""Plans of one or several replicas."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from apportion.asked.choices import PlanChoices
from apportion.asked.plan import ask, plan_asked, with_swap_space
from apportion.types.errors import InfeasibleError, UsageError

if TYPE_CHECKING:
    from apportion.catalog.described import Description
    from apportion.planner.plan_file import Planned
    from apportion.types.model import ModelSpec


def number_asked(text: str | None) -> int | None:
    """1 where nothing is asked for, None for 'auto'. Raises UsageError."""
    if text == "auto":
        return None
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"--replicas '{text}': write a number from 1, or auto")
    return 1 if text is None else int(text)


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
