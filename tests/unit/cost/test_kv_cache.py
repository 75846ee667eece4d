"""What keys and values take: by format, in windows, in layers of their own kind, and as constant states."""

from dataclasses import replace

import pytest
from planned import workload

from apportion.catalog.cluster_text import parse_devices
from apportion.catalog.known_models import known_config
from apportion.catalog.model_config import read_model_spec
from apportion.catalog.runnable import check_runnable
from apportion.cost.memory import kv_cache_bytes, layer_kv_tokens, plan_capacity
from apportion.cost.shard import stage_shards
from apportion.planner.build import make_plan
from apportion.planner.verify.plan import verify
from apportion.types.cluster import Cluster
from apportion.types.errors import InfeasibleError, ModelError, UsageError
from apportion.types.model import LayerCache, ModelSpec
from apportion.types.plan import Plan
from apportion.types.workload import Workload


def cards(text: str) -> Cluster:
    return parse_devices(text, lambda _: [])


def known(name: str) -> ModelSpec:
    return read_model_spec(known_config(name))


def kv_bytes(plan: Plan) -> int:
    return sum(memory.kv_bytes for memory in plan.memory.values())


LONG = Workload(
    prompt_tokens=512, output_tokens=128, concurrency=1, max_context_tokens=131072, objective="latency"
)


def test_gemma_fits_two_cards_of_an_engine_with_window_caches():
    """8192 bytes a token and layer (16 KV heads × 128 × 2 × 2): 10 of 62 layers are global, 10 GiB of 131,072 tokens;
    52 hold 1024 + 512 tokens: 0.61 GiB. With full caches it is 62 GiB."""
    model, two = known("gemma-3-27b"), cards("2x rtx-4060-ti-16gb")
    with pytest.raises(InfeasibleError):
        make_plan(model, two, LONG, ("int4",), streaming=False)
    plan = make_plan(model, two, replace(LONG, window_extra_tokens=512), ("int4",), streaming=False)
    assert kv_bytes(plan) == 8192 * (10 * 131072 + 52 * 1536)
    assert all(check.ok for check in verify(plan))
    assert sum(memory.total_bytes for memory in plan.memory.values()) < 30 * 2**30


@pytest.mark.parametrize(
    ("window", "extra", "tokens"),
    [(None, 512, 800), (100, None, 800), (100, 50, 4 * 150), (100, 5000, 800), (5000, 50, 800)],
)
def test_tokens_of_a_layer(window: int | None, extra: int | None, tokens: int):
    """Four sequences of 200 tokens."""
    plan = make_plan(
        known("qwen2.5-0.5b"), cards("rtx-3090"), workload("throughput", 4, context=200), ("bf16",)
    )
    capacity = replace(
        plan_capacity(plan),
        num_kv_blocks=50,
        block_tokens=16,
        max_context_tokens=200,
        window_extra_tokens=extra,
    )
    layer = replace(plan.model.layers[0], window_tokens=window)
    assert layer_kv_tokens(layer, capacity) == tokens


def test_keys_and_values_in_q8_0():
    """Qwen2.5-7B: 28 layers × 2 × 4 heads × 128 × 34/32 bytes = 30,464 a token."""
    model, card = known("qwen2.5-7b"), cards("rtx-3090")
    asked = replace(LONG, max_context_tokens=32768)
    plan = make_plan(model, card, replace(asked, kv_format="q8_0"), ("int4",))
    assert kv_bytes(plan) == 30_464 * 32768
    assert kv_bytes(make_plan(model, card, asked, ("int4",))) == 28 * 2 * 4 * 128 * 2 * 32768
    assert all(check.ok for check in verify(plan))
    with pytest.raises(UsageError, match="q8_0 can be planned and exported to other engines, but not run"):
        check_runnable(make_plan(model, card, replace(asked, kv_format="q8_0"), ("bf16",)))


@pytest.mark.parametrize(("kv_format", "bits"), [("fp8", 8), ("q5_1", 6), ("q4_0", 4.5), ("iq4_nl", 4.5)])
def test_bits_of_an_element(kv_format: str, bits: float):
    """llama.cpp's blocks of 32: q5_1 has 24 bytes, q4_0 and iq4_nl 18."""
    plan = make_plan(
        known("qwen2.5-7b"),
        cards("rtx-3090"),
        replace(LONG, max_context_tokens=4096, kv_format=kv_format),
        ("int4",),
    )
    assert kv_bytes(plan) == 28 * 2 * 4 * 128 * 4096 * bits / 8


def test_layers_of_other_kinds_in_one_model():
    """A third of the layers caches four times as much per KV head, a third latents, a third keeps states alone."""
    model = known("qwen2.5-7b")
    kinds = (
        LayerCache(per_kv_head=1024, products_per_kv_head=7 * 1024),
        LayerCache(per_kv_head=0, whole=640, products_per_kv_head=512),
        LayerCache(per_kv_head=0, state_bytes=3 * 2**20),
    )
    layers = tuple(replace(layer, cache=kinds[number % 3]) for number, layer in enumerate(model.layers))
    mixed = replace(model, layers=layers[:27], beside_embedding=1_000_000)
    asked = workload("throughput", 4, context=1024)
    for devices in (
        "rtx-3090",
        "2x rtx-3060-12gb",
        "a: rtx-3060-12gb; b: rtx-3060-12gb; link a-b 1GB/s 50us",
    ):
        plan = make_plan(mixed, cards(devices), asked, ("bf16",))
        assert all(check.ok for check in verify(plan)), devices
        for stage in plan.stages:
            held = [0, 0, 0]
            for number in range(stage.layer_start, stage.layer_stop):
                held[number % 3] += 1
            for rank, shard in enumerate(stage_shards(mixed, stage)):
                heads = stage.split.kv_heads[rank]
                token_bytes = 2 * (held[0] * 1024 * heads + held[1] * 640)
                expected = 4096 * token_bytes + 4 * held[2] * 3 * 2**20
                assert kv_cache_bytes(mixed, shard, plan_capacity(plan)) == expected
    with pytest.raises(ModelError):
        check_runnable(replace(plan, model=replace(mixed, family="something")))
