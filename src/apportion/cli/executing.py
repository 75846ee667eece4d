"""Who executes a plan that this engine does not, in words."""

from apportion.catalog.runnable import RUNNABLE_FORMATS
from apportion.export.limits import ABILITIES, Ability, engine_of
from apportion.export.weights import takers
from apportion.types.names import one_of
from apportion.types.plan import Plan


def executing_engines(plan: Plan) -> str | None:
    """None where this engine does."""
    limits = plan.constraints.engine
    if limits is not None:
        engine = engine_of(limits)
        return f"{limits.name}: with --out plan.json, apportion export plan.json --to {engine} prints its commands"
    foreign = [name for name in plan.weight_formats_in_use if name not in RUNNABLE_FORMATS]
    if not foreign:
        return None
    names = [name for name in takers(plan) if name in ABILITIES and _can(ABILITIES[name], plan)]
    if not names:
        return f"no engine that is known here: {foreign[0]} on these devices is only planned"
    return f"another engine (no {foreign[0]} here): --for {one_of(names[:3])} plans for it"


def _can(ability: Ability, plan: Plan) -> bool:
    devices = [plan.cluster.device(name) for name in plan.device_ids]
    kinds = {*ability.kinds, *(["cpu"] if ability.cpu else [])}
    return (
        {device.kind for device in devices} <= kinds
        and (ability.several_hosts or len({device.host for device in devices}) == 1)
        and all((device.compute_capability or 99) >= ability.least_capability for device in devices)
    )
