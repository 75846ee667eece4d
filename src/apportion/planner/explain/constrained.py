"""What a plan's constraints cost: the plan beside the best without them, and without each of them."""

from dataclasses import dataclass

from apportion.cost.estimate import plan_objective_value
from apportion.planner.weigh import Division, best_division
from apportion.types.constraints import Constraints
from apportion.types.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A constraint as it is typed, and what it costs while the others stay: the plan's objective over that of the best
    division without it, less one."""

    typed: str
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    best: Division
    """Without any of the constraints, within what an engine can do where the plan is for one."""
    loss: float
    """As of `Dropped`, of all of them together."""
    dropped: tuple[Dropped, ...]
    """Each by itself while the others stay; none where there is but one."""


def cost_of_constraints(plan: Plan) -> Cost | None:
    """None of a plan that has no constraints but what an engine can do."""
    rest = plan.constraints.engine_alone
    parts = [part for part in plan.constraints.parts() if part[1].engine == rest.engine]
    best = _best(plan, rest) if plan.constraints != rest else None
    if best is None:
        return None
    value = plan_objective_value(plan)
    each = [(typed, _best(plan, rest)) for typed, rest in parts] if len(parts) > 1 else []
    return Cost(
        best=best,
        loss=value / best.value - 1,
        dropped=tuple(
            Dropped(typed=typed, loss=value / one.value - 1) for typed, one in each if one is not None
        ),
    )


def _best(plan: Plan, constraints: Constraints) -> Division | None:
    return best_division(plan.model, plan.cluster, plan.workload, plan.weight_formats, constraints)
