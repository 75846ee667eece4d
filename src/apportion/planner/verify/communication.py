"""Checks the balance that a plan of least communication was held to."""

from apportion.cost.estimate import whole_step_s
from apportion.cost.statements import epsilon_s
from apportion.planner.communication.find import balanced_in, said
from apportion.planner.communication.window import keeps_balance
from apportion.planner.problem import plan_problem
from apportion.planner.verify.check import Check
from apportion.types.plan import Plan
from apportion.types.units import format_seconds


def balance_limit_check(plan: Plan) -> list[Check]:
    """Where there is a limit: in a decode step of all sequences, and in one microbatch of them."""
    limit = plan.workload.balance
    if limit is None:
        return []
    times_s = whole_step_s(plan.model, plan.cluster, plan.workload, plan.stages)
    mean_s = sum(times_s) / len(times_s)
    return [
        Check(
            name="balance asked",
            statement=f"in a step of {plan.workload.concurrency} stages take {format_seconds(mean_s)} on average and"
            f" are within {format_seconds(epsilon_s(times_s))} of that, {said(limit)} asked; also in microbatches",
            ok=plan.workload.objective == "communication"
            and keeps_balance(times_s, limit)
            and balanced_in(plan_problem(plan), plan.stages, plan.microbatches),
        )
    ]
