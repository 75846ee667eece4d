"""Which layers a plan streams, and whether their weights have room where they stay."""

from apportion.cost.host_room import host_rooms
from apportion.cost.memory import plan_memory
from apportion.planner.stages.streamed import streams_as_it_can
from apportion.planner.verify.check import Check
from apportion.types.plan import Plan
from apportion.types.units import format_bytes


def streams_check(plan: Plan) -> Check:
    number = sum(len(stage.streamed_layers) for stage in plan.stages)
    return Check(
        name="streams",
        statement=f"{number} of {plan.model.num_layers} layers are streamed, to devices with a rate for it",
        ok=all(streams_as_it_can(plan.cluster, stage) for stage in plan.stages),
    )


def host_room_check(plan: Plan) -> list[Check]:
    """Where anything is streamed."""
    rooms = host_rooms(plan.cluster, plan.stages, plan_memory(plan))
    if not rooms:
        return []
    statements = [
        room.statement()
        if room.streamed_bytes
        else f"{format_bytes(room.disk_bytes)} streamed from the disk of {room.host}"
        for room in rooms
    ]
    return [
        Check(name="host memory", statement="; ".join(statements), ok=not any(room.crowded for room in rooms))
    ]
