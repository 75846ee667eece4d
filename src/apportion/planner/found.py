"""What a search finds."""

from dataclasses import dataclass

from apportion.planner.problem import Problem
from apportion.types.plan import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """`problem` is the one that was searched: its workload says how many sequences run at once."""

    problem: Problem
    stages: tuple[Stage, ...]
    microbatches: int
    value: float
    """Of the objective."""
