"""Bytes and seconds of streamed layers, by hand and against a simulation of the two buffers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hand_model import CAPACITY, DECODE, LAYER, LAYER_BYTES, MODEL, device
from hypothesis import given
from hypothesis import strategies as st

from apportion.catalog.cluster_rules import emulate
from apportion.cost.formats import Formats
from apportion.cost.group_step import group_step_s, stage_members
from apportion.cost.memory import read_bytes, stages_memory
from apportion.cost.streaming import (
    DIRECT_BYTES_PER_CORE_S,
    added_s,
    arriving_s,
    evenly_streamed,
    streaming_step_s,
)
from apportion.types.cluster import Cache, Cluster, Device, DeviceKind, StreamSource
from apportion.types.model import LayerSpec, ModelSpec, Parameters
from apportion.types.plan import Stage, TensorSplit

MODEL = replace(MODEL, layers=(LAYER,) * 4)
STAGE = Stage(
    layer_start=0,
    layer_stop=4,
    split=TensorSplit(device_ids=("a",), q_heads=(4,), kv_heads=(2,), ffn_columns=(6,), vocab_rows=(10,)),
    weight_format="fp32",
    activation_format="fp32",
    kv_format="fp32",
    has_embedding=True,
    has_head=True,
    streamed_layers=(0, 1, 3),
)


def _cluster(kind: DeviceKind, source: StreamSource = "host memory") -> Cluster:
    """Reads 400 B/s, computes 1000 flop/s, streams 560 B/s."""
    streaming = replace(device("a"), kind=kind, stream_bytes_per_s=560.0, stream_from=source)
    return Cluster(devices=(streaming,), links=())


def _of(*layers: LayerSpec) -> ModelSpec:
    return replace(MODEL, layers=layers)


@pytest.mark.parametrize(
    ("kind", "source", "buffers"), [("cpu", "host memory", 1), ("cpu", "disk", 2), ("cuda", "host memory", 2)]
)
def test_streamed_layers_are_held_in_buffers_alone(kind: DeviceKind, source: StreamSource, buffers: int):
    cluster = _cluster(kind, source)
    held = stages_memory(MODEL, cluster, (replace(STAGE, streamed_layers=()),), CAPACITY)["a"]
    memory = stages_memory(MODEL, cluster, (STAGE,), CAPACITY)["a"]
    assert memory.streamed_bytes == 3 * LAYER_BYTES
    assert memory.stream_buffer_bytes == buffers * LAYER_BYTES
    assert memory.weights_bytes == held.weights_bytes - 3 * LAYER_BYTES
    assert held.engine_bytes - memory.engine_bytes == (3 - buffers) * LAYER_BYTES
    assert (memory.kv_bytes, memory.workspace_bytes) == (held.kv_bytes, held.workspace_bytes)


def test_streamed_layers_are_read_once_when_a_stage_is_built():
    """280 parameters of each of four layers, a table of 10 × 4 and the final norm of 4, in bf16."""
    assert read_bytes(MODEL, STAGE, 0) == 2 * (4 * 280 + 40 + 4)


@pytest.mark.parametrize(
    ("kind", "source", "seconds"),
    [("cpu", "host memory", 26.6), ("cpu", "disk", 20.6), ("cuda", "host memory", 20.6)],
)
def test_a_cpu_copies_itself_and_others_beside(kind: DeviceKind, source: StreamSource, seconds: float):
    """Computing: four layers of 4.08 + 0.72 + 0.25 s, and 0.4 s of drawing. Copying: 3 · 1120 bytes at 560 B/s."""
    cluster = _cluster(kind, source)
    members = stage_members(MODEL, cluster, STAGE)
    assert group_step_s(MODEL, members, None, DECODE) == pytest.approx(seconds)


def added(streaming: Device, tokens: int) -> float:
    formats = Formats(weights="fp32", activations="fp32", kv="fp32")
    whole = np.array(MODEL.kv_heads), np.array(MODEL.ffn_columns), np.array(LAYER_BYTES)
    return float(added_s(streaming, formats, LAYER, *whole, tokens))


def test_what_a_copied_layer_leaves_in_the_cache_is_not_read_from_memory_again():
    """A quarter of 1120 bytes is copied at 1120 B/s, the rest at 560: 1.75 s. The products (544 flops in 0.544 s) read
    1088 bytes, a quarter of them at 1600 B/s and the rest at 400: 2.21 s, where a layer that is held takes 2.72."""
    cache = Cache(num_bytes=280, read_bytes_per_s=1600.0, copied_bytes_per_s=1120.0)
    streaming = replace(device("a"), stream_bytes_per_s=560.0, cache=cache)
    _, shard = stage_members(MODEL, _cluster("cpu"), STAGE)[0]
    assert added(streaming, tokens=1) == pytest.approx(1.75 + 2.21 - 2.72)
    assert streaming_step_s([(streaming, shard)], DECODE, 20.6) == pytest.approx(20.6 + 3 * 1.24)


def test_products_that_are_slower_than_memory_gain_nothing_from_the_cache():
    """Of 100 tokens they take 54.4 s, however quickly their weights come."""
    cache = Cache(num_bytes=1120, read_bytes_per_s=1600.0, copied_bytes_per_s=1120.0)
    streaming = replace(device("a"), stream_bytes_per_s=560.0, cache=cache)
    assert added(streaming, tokens=100) == pytest.approx(1.0)


def test_reading_a_disk_takes_some_of_the_core():
    streaming = replace(device("a", speed=0.5), stream_bytes_per_s=560.0, stream_from="disk")
    assert added(streaming, tokens=1) == 2 * 1120 / DIRECT_BYTES_PER_CORE_S


def test_the_end_of_a_buffer_is_read_from_a_disk_a_third_as_fast():
    """A mebibyte of it, or all that is less."""
    streaming = replace(device("a"), stream_bytes_per_s=2.0**20, stream_from="disk")
    assert float(arriving_s(streaming, np.array(10 * 2**20))) == 9 + 3
    assert float(arriving_s(streaming, np.array(2**19))) == 1.5
    card = replace(streaming, kind="cuda", stream_from="host memory")
    assert float(arriving_s(card, np.array(10 * 2**20))) == 10


def test_of_a_group_the_slowest_copy_of_each_layer_counts():
    """a has 4 · (100 + 48 + 8) = 624 bytes of a layer and copies 560 B/s, b 4 · (100 + 24 + 8) = 528 bytes at 280 B/s;
    b takes longer, and as one that copies beside computing it would take all three layers' time at least."""
    split = TensorSplit(
        device_ids=("a", "b"), q_heads=(2, 2), kv_heads=(1, 1), ffn_columns=(4, 2), vocab_rows=(6, 4)
    )
    quick = replace(device("a"), stream_bytes_per_s=560.0)
    for slow, step_s in (
        (replace(device("b"), stream_bytes_per_s=280.0), 2 + 3 * 528 / 280),
        (replace(device("b"), kind="cuda", stream_bytes_per_s=280.0), max(2 + 3 * 624 / 560, 3 * 528 / 280)),
    ):
        members = stage_members(MODEL, Cluster(devices=(quick, slow), links=()), replace(STAGE, split=split))
        assert streaming_step_s(members, DECODE, 2.0) == pytest.approx(step_s)


def test_copying_that_takes_longer_decides():
    device, shard = stage_members(MODEL, _cluster("cuda"), STAGE)[0]
    assert streaming_step_s([(device, shard)], DECODE, 5.0) == 6.0


def test_layers_are_streamed_evenly_and_the_largest_first():
    small = replace(LAYER, per_ffn_column=Parameters(elements=1, rows=1, others=0))
    assert evenly_streamed(_of(*[LAYER] * 12), 0, 12, 3) == (2, 6, 10)
    assert evenly_streamed(_of(*[LAYER] * 12), 4, 8, 2) == (5, 7)
    mixed = _of(small, small, LAYER, LAYER, small, LAYER)
    assert evenly_streamed(mixed, 0, 6, 2) == (2, 5)
    assert evenly_streamed(mixed, 0, 6, 3) == (2, 3, 5)
    assert evenly_streamed(mixed, 0, 6, 4) == (1, 2, 3, 5)


def _simulated_step_s(
    computing: Sequence[float], streamed: Sequence[int], copy_s: float, steps: int
) -> float:
    """Mean time of a step, once steps follow one another: two buffers, one copy at a time, layers in order."""
    now = copied = 0.0
    freed = [0.0, 0.0]
    ends: list[float] = []
    use = 0
    for _ in range(steps):
        for layer, seconds in enumerate(computing):
            if layer in streamed:
                copied = max(copied, freed[use % 2]) + copy_s
                now = max(now, copied) + seconds
                freed[use % 2] = now
                use += 1
            else:
                now += seconds
        ends.append(now)
    half = steps // 2
    return (ends[-1] - ends[half - 1]) / (steps - half)


@given(
    num_layers=st.integers(3, 40), part=st.floats(0, 1), copy_s=st.floats(0.05, 20), layer_s=st.floats(0.1, 3)
)
def test_two_buffers_hide_the_shorter_of_copying_and_computing(
    num_layers: int, part: float, copy_s: float, layer_s: float
):
    """Layers alike, spread by the rule: exactly as the formula where gaps can be even, else within a tenth of it."""
    count = 3 + round(part * (num_layers - 3))
    streamed = evenly_streamed(_of(*[LAYER] * num_layers), 0, num_layers, count)
    simulated = _simulated_step_s([layer_s] * num_layers, streamed, copy_s, 60)
    formula = max(num_layers * layer_s, count * copy_s)
    even = 2 * count <= num_layers or count == num_layers
    assert formula * (1 - 1e-9) <= simulated <= formula * (1 + 1e-9 if even else 1.11)


def test_gaps_in_one_place_do_not():
    """Why layers are spread: with all four at the end, the computing of the others hides two copies only."""
    simulated = _simulated_step_s([1.0] * 12, [8, 9, 10, 11], 3.0, 60)
    assert simulated > 12 * 1.25


def test_an_emulated_device_copies_as_much_slower():
    cache = Cache(num_bytes=280, read_bytes_per_s=1600.0, copied_bytes_per_s=1120.0)
    fast = replace(device("a"), stream_bytes_per_s=8e9, cache=cache)
    slower = replace(cache, read_bytes_per_s=400.0, copied_bytes_per_s=280.0)
    assert emulate(fast, 0.25).cache == slower
    assert emulate(fast, 0.25).stream_bytes_per_s == 2e9
    assert emulate(replace(fast, stream_from="disk"), 0.25).stream_bytes_per_s == 8e9
    assert emulate(replace(fast, stream_bytes_per_s=None), 0.25).stream_bytes_per_s is None
