"""What `plan` says and draws of plans of several replicas."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from apportion.types.errors import UsageError

if TYPE_CHECKING:
    from apportion.planner.plan_file import Planned
    from apportion.types.plan import Plan


def refuse_beside(*, compare: bool, why: bool) -> None:
    """Raises UsageError for what is said of one pipeline alone."""
    if compare or why:
        name = "--compare" if compare else "--why"
        raise UsageError(f"{name} is about one pipeline; leave out --replicas, or {name}")


def pictures(plan: "Planned", path: Path) -> "Iterator[tuple[Plan, Path]]":
    """Every pipeline and the file it is drawn to: of several replicas plan-0.svg, plan-1.svg, …"""
    from apportion.types.replicated import ReplicatedPlan

    if not isinstance(plan, ReplicatedPlan):
        yield plan, path
    else:
        for number, replica in enumerate(plan.replicas):
            yield replica, path.with_stem(f"{path.stem}-{number}")
