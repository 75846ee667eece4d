"""The fastest division beside one of least communication."""

from apportion.planner.weigh import Division, best_division
from apportion.types.plan import Plan


def fastest_beside(plan: Plan) -> Division | None:
    """For the same workload and constraints, without the balance: of one request alone, or of all where there are
    several. None where none is found."""
    return best_division(
        plan.model, plan.cluster, plan.workload.for_speed, plan.weight_formats, plan.constraints
    )
