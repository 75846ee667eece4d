"""What the scheduler weighs by, against numbers worked out by hand: two stages of one layer on devices that read 80
bytes a second and compute in no time.

A layer's weights are 280 elements = 1120 bytes, 14 s. A position's keys and values are 2 · 2 heads · 5 · 4 = 80 bytes,
1 s.
"""

from dataclasses import replace
from math import inf

import pytest
from hand_model import MODEL
from plans import BLOCK_TOKENS, cpu_device, hand_plan

from apportion.types.step_costs import StepCosts

MODEL = replace(MODEL, tied_embeddings=False)
DEVICES = [
    replace(
        cpu_device(name),
        mem_bytes_per_s=bytes_per_s,
        flops_per_s={"fp32": inf},
        layer_overhead_s=0.0,
        step_overhead_s=0.0,
    )
    for name, bytes_per_s in (("a", 80.0), ("b", 160.0))
]


@pytest.fixture(scope="module")
def costs() -> StepCosts:
    plan = hand_plan(
        MODEL, [[1], [1]], [1, 1], concurrency=4, chunk_tokens=12, microbatches=2, devices=DEVICES
    )
    return plan.step_costs


def test_a_sequence_more_and_a_position_more_take_a_position_s_reading(costs: StepCosts):
    """On the slower device, a; link and head take next to nothing."""
    assert costs.decode_token_s == pytest.approx(1.0)
    assert costs.context_token_s == pytest.approx(1.0)
    assert costs.decode_s(10) == pytest.approx(11.0)


def test_a_chunk_reads_the_weights_and_its_own_positions_once(costs: StepCosts):
    """12 tokens: 14 s + 12 s on a, half of that on b; so two chunks, and the link's bit, keep a busy."""
    assert costs.prefill_token_s == pytest.approx(26 / 12, rel=0.1)
    assert costs.prefill_depth == 2
    assert costs.recompute_s(10) == pytest.approx(10 * costs.prefill_token_s + 50.0)


def test_a_swapped_block_is_read_and_written(costs: StepCosts):
    """4 positions of 80 bytes, on a in 3 · 4 s one way; both devices' bytes are counted."""
    assert BLOCK_TOKENS == 4
    assert costs.swap_block_s == pytest.approx(12.0)
    assert costs.block_bytes == 2 * 4 * 80


def test_a_copy_engine_s_rate_is_taken_where_it_is_known():
    devices = [replace(one, stream_bytes_per_s=32.0) for one in DEVICES]
    plan = hand_plan(MODEL, [[1], [1]], [1, 1], concurrency=4, chunk_tokens=12, devices=devices)
    assert plan.step_costs.swap_block_s == pytest.approx(10.0)
