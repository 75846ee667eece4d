"""How much KV cache a plan asks for, and how much more each of its stages would hold.

All stages have the same blocks, so the stage with the least room decides for all of them.
"""

from dataclasses import replace

from apportion.cost.memory import kv_bytes_per_token, plan_memory
from apportion.cost.shard import stage_shards
from apportion.types.plan import KvRoom, Plan, Stage


def kv_rooms(plan: Plan) -> tuple[KvRoom, ...]:
    """By stage, from what the plan leaves free on its members."""
    return tuple(_room(plan, stage) for stage in plan.stages)


def _room(plan: Plan, stage: Stage) -> KvRoom:
    memory = plan_memory(plan)
    spare: dict[str, int] = {}
    for device_id, shard in zip(stage.split.device_ids, stage_shards(plan.model, stage), strict=True):
        left_bytes = plan.cluster.device(device_id).memory_bytes - memory[device_id].total_bytes
        token_bytes = kv_bytes_per_token(plan.model, shard, plan.workload.window_extra_tokens)
        # A stage may have no layer whose cache grows; it then holds more than any other.
        spare[device_id] = left_bytes // (plan.block_tokens * max(1, token_bytes))
    least = min(spare, key=lambda device_id: spare[device_id])
    return KvRoom(device_id=least, spare_blocks=spare[least])


def with_kv_rooms(plan: Plan) -> Plan:
    return replace(plan, kv_rooms=kv_rooms(plan))


def with_most_kv(plan: Plan) -> Plan:
    """The plan with all memory that its division leaves free given to the KV cache, up to the stage that is full
    first."""
    more_blocks = max(0, min(room.spare_blocks for room in kv_rooms(plan)))
    larger = replace(plan, num_kv_blocks=plan.num_kv_blocks + more_blocks)
    return with_kv_rooms(replace(larger, memory=plan_memory(larger)))
