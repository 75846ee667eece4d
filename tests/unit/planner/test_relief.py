"""Where nothing fits: the binding device is named, and every change that is advised is the least that helps."""

import re
from dataclasses import replace
from functools import partial

import pytest
from planned import GIB, cluster, cpu, llama, workload

from apportion.catalog.cluster_text import parse_devices
from apportion.catalog.datasheet import common_cards
from apportion.catalog.known_models import known_config
from apportion.catalog.model_config import read_model_spec
from apportion.planner.build import fits, make_plan
from apportion.planner.infeasible.error import infeasible_error
from apportion.planner.infeasible.relief import MEMORY_STEP_BYTES, Demand, changes, least_memory
from apportion.types.cluster import Cluster
from apportion.types.errors import InfeasibleError

CARDS = common_cards()


def demand(
    of: Cluster, concurrency: int = 1, context: int = 2048, formats: tuple[str, ...] = ("fp32",)
) -> Demand:
    asked = Demand(
        model=llama(),
        cluster=of,
        workload=workload(concurrency=concurrency, context=context),
        weight_formats=formats,
        fits=partial(fits, streaming=False),
        cards=CARDS,
    )
    assert not asked.holds()
    return asked


def advice(asked: Demand, pattern: str) -> re.Match[str]:
    found = [match for one in changes(asked, least_memory(asked)) if (match := re.fullmatch(pattern, one))]
    assert len(found) == 1, list(changes(asked, least_memory(asked)))
    return found[0]


def test_memory_on_the_device_that_needs_least_and_no_less_would_do():
    asked = demand(cluster([cpu("laptop", 1), cpu("desk", 1.5)]))
    first = least_memory(asked)[0]
    assert first.more_bytes <= least_memory(asked)[-1].more_bytes

    def with_more(more_bytes: int) -> bool:
        devices = tuple(
            replace(one, memory_bytes=one.memory_bytes + more_bytes) if one.id == first.device.id else one
            for one in asked.cluster.devices
        )
        return asked.holds(cluster=replace(asked.cluster, devices=devices))

    assert with_more(first.more_bytes)
    step = min(MEMORY_STEP_BYTES, first.device.memory_bytes // 64)
    assert not with_more(first.more_bytes - step)
    assert f"more on {first.device.id}" in str(infeasible_error(asked))


@pytest.mark.parametrize(
    "devices", ["Mac mini M4 16GB", "a: Strix Halo 32GB", "a: m4; b: m4; link a-b 1Gbit 0.3ms"]
)
def test_whole_computers_are_not_told_to_add_a_card(devices: str) -> None:
    """What can be done: less context or narrower weights, a variant with more memory, another host."""
    with pytest.raises(InfeasibleError) as caught:
        make_plan(
            read_model_spec(known_config("llama-3.1-70b" if "Strix" in devices else "qwen3-32b")),
            parse_devices(devices, lambda _: []),
            workload(context=2048),
            ("bf16",),
            streaming=False,
            cards=CARDS,
        )
    said = str(caught.value)
    assert "one more card" not in said
    assert re.search(r"try --weights int[48]|in a variant with [\d.]+ GiB of memory", said)
    assert ("one more host with rtx-" in said) or "in a variant" in said


def test_as_many_requests_as_fit():
    alone = make_plan(llama(), cluster([cpu("a", 16)]), workload(concurrency=3), ("fp32",))
    tight = replace(cpu("a", 1), memory_bytes=alone.memory["a"].total_bytes)
    asked = demand(cluster([tight]), concurrency=9)
    number = int(advice(asked, r"--concurrency (\d+)")[1])
    assert asked.holds(workload=replace(asked.workload, concurrency=number))
    assert not asked.holds(workload=replace(asked.workload, concurrency=number + 1))


def test_the_smallest_card_that_does_is_named_with_its_host():
    small = parse_devices("tower: gtx-1650", lambda _: [])
    asked = demand(small, concurrency=64, context=8192, formats=("fp16",))
    host, name = advice(asked, r"one more card on (\S+), (\S+) or larger").groups()
    cards = [card for card in CARDS if card.id == name]
    assert host == "tower"

    def with_card(number: int) -> bool:
        one = replace(CARDS[number], host=host)
        return asked.holds(cluster=replace(asked.cluster, devices=(*asked.cluster.devices, one)))

    number = CARDS.index(cards[0])
    assert with_card(number)
    assert number == 0 or not with_card(number - 1)


def test_a_missing_link_is_named_where_it_is_what_binds():
    apart = cluster([cpu("a", 2.8, host="x"), cpu("b", 2.8, host="y")], joined=False)
    assert advice(demand(apart), r"a link (\S+)")[1] == "x-y"
    with pytest.raises(InfeasibleError, match=r"what binds is the memory of \w, 2\.8 GiB"):
        make_plan(llama(), apart, workload(), ("fp32",))


def test_narrower_keys_and_values_are_named_where_they_would_fit():
    short, asked = cluster([cpu("a", 3.97)]), workload(concurrency=4)
    with pytest.raises(InfeasibleError, match="--kv-format fp16"):
        make_plan(llama(), short, asked, ("fp32",))
    assert make_plan(llama(), short, replace(asked, kv_format="fp16"), ("fp32",)).kv_format == "fp16"


def test_cards_are_of_different_memory_smallest_first():
    sizes = [card.memory_bytes for card in CARDS]
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= 8 * GIB
