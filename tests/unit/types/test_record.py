"""Dataclasses as plain values and back."""

from dataclasses import dataclass, replace
from pathlib import Path

import msgpack
import pytest
from plans import hand_plan

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.engine.launcher import places
from apportion.engine.place import WorkerPlace
from apportion.types.constraints import Constraints, FixedStage, Pin
from apportion.types.plan import KvRoom, Plan
from apportion.types.record import from_plain, plain


def through_the_wire(value: object) -> object:
    return msgpack.unpackb(msgpack.packb(plain(value)), strict_map_key=False)


@pytest.fixture(params=["demo", "mixtral-8x7b", "deepseek-v3"])
def plan(request: pytest.FixtureRequest) -> Plan:
    model = read_model_spec(resolve_model(request.param, weights=False))
    plan = hand_plan(model, [[1], [3, 1]], [2, model.num_layers - 2])
    constraints = Constraints(
        use_all=True,
        excluded=("x",),
        pins=(Pin(device_id="d0"), Pin(device_id="d1", layer_start=3, layer_stop=4)),
        stages=(FixedStage(device_ids=("d1", "d2"), layer_start=0, layer_stop=2, shares=(3, 1)),),
    )
    rooms = (KvRoom(device_id="d0", spare_blocks=3),)
    cluster = replace(plan.cluster, others_bytes_per_s={"local": (1.0, 2.5)})
    return replace(plan, constraints=constraints, kv_rooms=rooms, cluster=cluster)


def test_a_place_with_its_whole_plan_comes_back_equal(plan: Plan):
    for place in places(plan, Path("/models"), {"d0": "0"}, random_weights=True, trace=False).values():
        assert from_plain(WorkerPlace, through_the_wire(place)) == place


@dataclass(frozen=True)
class Choices:
    names: tuple[str, ...] | None
    pair: tuple[int, float]
    either: str | int | None
    by_number: dict[int, tuple[str, ...]]


@pytest.mark.parametrize(
    "choices",
    [
        Choices(None, (1, 2.0), None, {}),
        Choices((), (-1, float("inf")), "x", {3: ("a",)}),
        Choices(("a", "é"), (2**63, 0.1), 7, {0: (), -4: ("b", "c")}),
    ],
)
def test_optional_fixed_and_nested_fields(choices: Choices):
    assert from_plain(Choices, through_the_wire(choices)) == choices
