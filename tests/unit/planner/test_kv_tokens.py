"""KV cache for fewer tokens than every sequence at full context, and how much more each stage would hold."""

from dataclasses import replace
from functools import partial

import pytest
from planned import cluster, cpu, llama, workload

from apportion.asked.kv_tokens import typical_tokens, with_kv_choice
from apportion.cost.kv_capacity import kv_rooms, with_most_kv
from apportion.cost.memory import plan_memory
from apportion.cost.service import least_kv_tokens
from apportion.planner.build import fits, make_plan
from apportion.planner.infeasible.relief import Demand, changes
from apportion.planner.plan_file import parse_plan, plan_json
from apportion.planner.verify.plan import verify
from apportion.types.errors import UsageError
from apportion.types.plan import KvRoom, Plan

MIB = 2**20
CLUSTER = cluster([cpu("a", 3, 0.5), cpu("b", 3.5)])
ASKED = workload("throughput", concurrency=8, context=2048)
SHARED = replace(ASKED, kv_tokens=6000)


@pytest.fixture(scope="module")
def shared() -> Plan:
    return make_plan(llama(), CLUSTER, SHARED, ("fp32",))


def failing(plan: Plan) -> set[str]:
    return {check.name for check in verify(plan) if not check.ok}


def test_a_plan_has_the_blocks_that_are_asked_for(shared: Plan):
    assert least_kv_tokens(SHARED) <= 6000 < 8 * 2048
    assert shared.num_kv_blocks == 375
    assert shared == parse_plan(plan_json(shared), "")
    assert failing(shared) == set()
    assert failing(replace(shared, num_kv_blocks=374)) >= {"memory"}


def test_rooms_are_what_is_left_in_whole_blocks(shared: Plan):
    """A layer's block: 16 tokens of 2 · 8 heads · 64 · 4 bytes."""
    for stage, room in zip(shared.stages, shared.kv_rooms, strict=True):
        block_bytes = [16 * stage.num_layers * 2 * 64 * 4 * heads for heads in stage.split.kv_heads]
        left = [
            shared.cluster.device(one).memory_bytes - shared.memory[one].total_bytes
            for one in stage.split.device_ids
        ]
        spare = [one // size for one, size in zip(left, block_bytes, strict=True)]
        assert room.spare_blocks == min(spare)
        assert room.device_id == stage.split.device_ids[spare.index(min(spare))]
    wrong = tuple(
        KvRoom(device_id=room.device_id, spare_blocks=room.spare_blocks + 1) for room in shared.kv_rooms
    )
    assert failing(replace(shared, kv_rooms=wrong)) == {"memory"}


def test_the_most_fills_the_stage_that_limits_and_no_block_more_would_fit(shared: Plan):
    full = with_most_kv(shared)
    assert full.num_kv_blocks == shared.num_kv_blocks + min(room.spare_blocks for room in shared.kv_rooms)
    assert min(room.spare_blocks for room in full.kv_rooms) == 0
    assert full.kv_rooms == kv_rooms(full)
    assert failing(full) == set()
    beyond = plan_memory(replace(full, num_kv_blocks=full.num_kv_blocks + 1))
    assert any(one.total_bytes > CLUSTER.device(name).memory_bytes for name, one in beyond.items())


def test_too_few_for_the_requests_in_flight_are_refused():
    with pytest.raises(UsageError, match=f"less than {least_kv_tokens(ASKED)}, which"):
        make_plan(llama(), CLUSTER, replace(ASKED, kv_tokens=least_kv_tokens(ASKED) - 1), ("fp32",))


def test_an_arrival_rate_is_served_by_what_the_cache_holds():
    """As many in flight as it has room for, and no more."""
    served = replace(ASKED, concurrency=1, arrival_rate=0.1)
    free = make_plan(llama(), CLUSTER, served, ("fp32",))
    typical = ASKED.prompt_tokens + ASKED.output_tokens
    enough = replace(served, kv_tokens=max(2048, free.workload.concurrency * typical))
    assert make_plan(llama(), CLUSTER, enough, ("fp32",)).workload.concurrency == free.workload.concurrency


@pytest.mark.parametrize(("given", "tokens"), [(None, None), ("4096", 4096), ("25%", 4096), ("100%", 16384)])
def test_what_is_typed(given: str | None, tokens: int | None):
    assert with_kv_choice(ASKED, given).kv_tokens == tokens


def test_the_most_is_planned_from_the_least():
    assert with_kv_choice(ASKED, "max").kv_tokens == least_kv_tokens(ASKED)


@pytest.mark.parametrize("given", ["", "0", "0%", "-3", "1.5", "all"])
def test_what_is_no_number_is_refused(given: str):
    with pytest.raises(UsageError, match="max, like 8192, 8k or 50%"):
        with_kv_choice(ASKED, given)


def test_a_percentage_of_what_a_rate_leaves_open_is_refused():
    with pytest.raises(UsageError, match="leaves the concurrency open"):
        with_kv_choice(replace(ASKED, arrival_rate=1.0), "50%")


def test_typical_requests_are_as_short_as_the_cache_asks():
    assert typical_tokens("50%", 4, 1000) == 500
    assert typical_tokens("1200", 4, 1000) == 300
    assert typical_tokens(None, 4, 1000) == typical_tokens("max", 4, 1000) == 1000


def test_sharing_the_cache_is_advised_where_that_is_what_it_takes():
    """One device with room for what 6000 tokens take, 37 % of what all at full context would."""
    alone = make_plan(llama(), cluster([cpu("a", 100)]), SHARED, ("fp32",))
    small = cluster([replace(cpu("a", 1), memory_bytes=alone.memory["a"].total_bytes)])
    asked = Demand(
        model=llama(),
        cluster=small,
        workload=ASKED,
        weight_formats=("fp32",),
        fits=partial(fits, streaming=False),
        cards=(),
    )
    advised = [one for one in changes(asked, ()) if one.startswith("--kv-tokens")]
    assert len(advised) == 1
    kept = with_kv_choice(ASKED, advised[0].split()[1])
    assert make_plan(llama(), small, kept, ("fp32",), streaming=False).num_kv_blocks * 16 <= 6000
