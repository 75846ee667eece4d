"""Experts in system memory beside what is demanded of single devices: kept, or no such division."""

from dataclasses import replace

import pytest

from apportion.catalog.cluster_text import parse_devices
from apportion.catalog.known_models import known_config
from apportion.catalog.model_config import read_model_spec
from apportion.cost.formats import Formats
from apportion.cost.memory import Capacity
from apportion.export.experts import ExpertSplit, best_expert_split
from apportion.types.constraints import UNCONSTRAINED, Constraints, FixedStage, Pin
from apportion.types.workload import Workload

MODEL = read_model_spec(known_config("qwen3-30b-a3b"))
CLUSTER = parse_devices("tower: a=rtx-3060-8gb + b=rtx-4060-ti-16gb + cpu:64GiB", tuple)
FORMATS = Formats(weights="int4", activations="fp16", kv="fp16")
WORKLOAD = Workload(
    prompt_tokens=512, output_tokens=128, concurrency=1, max_context_tokens=4096, objective="latency"
)
CAPACITY = Capacity(
    num_kv_blocks=256,
    block_tokens=16,
    chunk_tokens=512,
    concurrency=1,
    max_context_tokens=4096,
    messages_in_flight=4,
    embedding_on_host=True,
)


def split(**constraints: object) -> ExpertSplit | None:
    asked = replace(UNCONSTRAINED, **constraints)  # pyright: ignore[reportArgumentType]
    return best_expert_split(MODEL, CLUSTER, WORKLOAD, FORMATS, CAPACITY, asked)


def runs(found: ExpertSplit | None) -> dict[str, tuple[int, int]]:
    assert found is not None
    return {gpu.id: (start, stop) for gpu, start, stop in found.runs}


@pytest.mark.parametrize(
    "pin",
    [Pin(device_id="a", layer_start=0, layer_stop=3), Pin(device_id="a", layer_start=47, layer_stop=48)],
)
def test_pinned_layers_are_on_their_card(pin: Pin):
    held = runs(split(pins=(pin,)))
    start, stop = held["a"]
    assert start <= pin.layer_start
    assert pin.layer_stop <= stop


def test_a_stage_by_hand_is_kept_to_the_layer():
    stage = FixedStage(device_ids=("b",), layer_start=5, layer_stop=48)
    assert runs(split(stages=(stage,))) == {"a": (0, 5), "b": (5, 48)}


def test_every_card_takes_part_where_that_is_asked():
    assert set(runs(split(use_all=True))) == {"a", "b"}
    assert "a" in runs(split(pins=(Pin(device_id="a"),)))


def test_what_the_best_does_anyway_costs_nothing_and_all_else_no_less():
    best = split()
    assert best is not None
    kept = split(pins=tuple(Pin(device_id=gpu.id, layer_start=a, layer_stop=b) for gpu, a, b in best.runs))
    assert kept == best
    for stop in range(1, 48, 6):
        other = split(pins=(Pin(device_id="a", layer_start=0, layer_stop=stop),))
        assert other is None or other.tokens_per_s <= best.tokens_per_s


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(pins=(Pin(device_id="cpu", layer_start=0, layer_stop=1),)),
        Constraints(stages=(FixedStage(device_ids=("a", "b"), layer_start=0, layer_stop=48),)),
        Constraints(stages=(FixedStage(device_ids=("cpu",), layer_start=0, layer_stop=9),)),
    ],
    ids=["layers on the CPU", "a group", "a stage on the CPU"],
)
def test_what_it_cannot_keep_is_no_such_division(constraints: Constraints):
    assert best_expert_split(MODEL, CLUSTER, WORKLOAD, FORMATS, CAPACITY, constraints) is None
