"""Whether a plan keeps to the constraints that its certificate is relative to."""

from apportion.cost.traffic import coordinator_host
from apportion.planner.verify.check import Check
from apportion.types.constraints import EngineLimits
from apportion.types.plan import Plan, TensorSplit


def constraints_check(plan: Plan) -> list[Check]:
    """Where there are any."""
    constraints = plan.constraints
    if not constraints.statement:
        return []
    splits = [stage.split for stage in plan.stages if stage.split.size > 1]
    ok = constraints.groups == "any" or (constraints.groups == "even" and all(map(_is_even, splits)))
    ok |= not splits
    ok &= constraints.engine is None or _is_within(plan, constraints.engine)
    ok &= not constraints.use_all or set(plan.device_ids) == {device.id for device in plan.cluster.devices}
    return [Check(name="constraints", statement=f"the plan is held to: {constraints.statement}", ok=ok)]


def _is_within(plan: Plan, engine: EngineLimits) -> bool:
    main, known = coordinator_host(plan.cluster), {device.id: device for device in plan.cluster.devices}
    members = [[known[name] for name in stage.split.device_ids if name in known] for stage in plan.stages]
    ok = all(stage.split.size == engine.group_size and _is_even(stage.split) for stage in plan.stages)
    later = (device for group in members[1:] for device in group)
    ok &= not engine.cpu_first or all(device.kind != "cpu" or device.host != main for device in later)
    return ok and all(
        engine.buffer_bytes.get(device.id, 0) <= device.reserved_bytes
        for group in members
        for device in group
    )


def _is_even(split: TensorSplit) -> bool:
    """But for vocabulary rows, which need not divide."""
    return len(set(split.kv_heads)) == 1 and len(set(split.ffn_columns)) == 1
