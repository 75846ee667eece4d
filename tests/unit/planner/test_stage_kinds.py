"""What the search counts on for a member's memory, against the cost model."""

from dataclasses import replace

import pytest
from hand_model import CAPACITY, MODEL, device

from apportion.cost.formats import Formats
from apportion.cost.memory import shard_memory
from apportion.planner.stages.axes import ffn_granule, make_shard
from apportion.planner.stages.kinds import StageKinds

FP32 = Formats(weights="fp32", activations="fp32", kv="fp32")


@pytest.mark.parametrize("devices", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_the_search_knows_what_every_member_of_a_group_needs(devices: list[str]):
    kinds = StageKinds(MODEL)
    members = [replace(device(name), kind="cpu", torch_device="cpu") for name in devices]
    size = len(devices)
    for number, kind in enumerate(kinds.kinds):
        rooms = kinds.rooms(CAPACITY, FP32, members, number)
        for rank, (member, room) in enumerate(zip(members, rooms, strict=True)):
            shard = make_shard(kind, FP32, rank, size, 1, ffn_granule(MODEL), 3)
            needed = shard_memory(MODEL, shard, CAPACITY, member).engine_bytes
            counted = room.head_bytes + room.granule_bytes + 3 * room.row_bytes - room.free_bytes
            assert counted == needed - member.usable_bytes
            figures = kinds.bytes(CAPACITY, FP32, member, rank=rank, size=size)[number]
            assert figures @ (1, 1, 1, 3) == needed
