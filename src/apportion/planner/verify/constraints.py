"""Whether a plan keeps to the constraints that its certificate is relative to."""

from apportion.cost.traffic import coordinator_host
from apportion.planner.problem import plan_problem
from apportion.planner.stages.axes import ffn_granule
from apportion.planner.stages.places import allowed_ranges, fixed_shares
from apportion.planner.verify.check import Check
from apportion.types.constraints import EngineLimits
from apportion.types.plan import Plan, Stage


def constraints_check(plan: Plan) -> list[Check]:
    """Where there are any."""
    constraints = plan.constraints
    if not constraints.statement:
        return []
    known, used = {device.id for device in plan.cluster.devices}, set(plan.device_ids)
    excluded = set(constraints.excluded)
    ok = used <= known - excluded and constraints.used <= used
    ok &= not constraints.use_all or used == known - excluded
    ok &= constraints.groups != "none" or all(stage.split.size == 1 for stage in plan.stages)
    ok = ok and all(_in_place(plan, stage) for stage in plan.stages)
    ok &= constraints.engine is None or _is_within(plan, constraints.engine)
    return [Check(name="constraints", statement=f"the plan is held to: {constraints.statement}", ok=ok)]


def _in_place(plan: Plan, stage: Stage) -> bool:
    """With the shares that the constraints say; vocabulary rows follow the FFN columns."""
    problem, granule = plan_problem(plan), ffn_granule(plan.model)
    members = [plan.cluster.device(device_id) for device_id in stage.split.device_ids]
    shares = fixed_shares(problem, members)
    held = stage.split.kv_heads, tuple(columns // granule for columns in stage.split.ffn_columns)
    places = allowed_ranges(problem, members)
    return bool(places[stage.layer_start, stage.layer_stop]) and shares in (None, held)


def _is_within(plan: Plan, engine: EngineLimits) -> bool:
    main, known = coordinator_host(plan.cluster), {device.id: device for device in plan.cluster.devices}
    members = [[known[name] for name in stage.split.device_ids if name in known] for stage in plan.stages]
    ok = all(stage.split.size == engine.group_size for stage in plan.stages)
    later = (device for group in members[1:] for device in group)
    ok &= not engine.cpu_first or all(device.kind != "cpu" or device.host != main for device in later)
    return ok and all(
        engine.buffer_bytes.get(device.id, 0) <= device.reserved_bytes
        for group in members
        for device in group
    )
