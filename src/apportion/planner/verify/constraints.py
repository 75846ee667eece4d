"""Whether a plan keeps to the constraints that its certificate is relative to."""

from apportion.planner.verify.check import Check
from apportion.types.plan import Plan, TensorSplit


def constraints_check(plan: Plan) -> list[Check]:
    """Where there are any."""
    constraints = plan.constraints
    if not constraints.statement:
        return []
    splits = [stage.split for stage in plan.stages if stage.split.size > 1]
    ok = constraints.groups == "any" or (constraints.groups == "even" and all(map(_is_even, splits)))
    ok |= not splits
    ok &= not constraints.use_all or set(plan.device_ids) == {device.id for device in plan.cluster.devices}
    return [Check(name="constraints", statement=f"the plan is held to: {constraints.statement}", ok=ok)]


def _is_even(split: TensorSplit) -> bool:
    """But for vocabulary rows, which need not divide."""
    return len(set(split.kv_heads)) == 1 and len(set(split.ffn_columns)) == 1
