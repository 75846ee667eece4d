"""Layers whose weights are not held: in every step they come from host memory or a disk into buffers of one layer.

A GPU copies beside computing, and so does a disk, which writes to memory past the core. There are two buffers: while
one layer is computed from the first, the next streamed one arrives in the second. Steps that follow one another form an
event graph of two lanes, copies w and computing c, with an edge from computing the i-th streamed layer to copying the
(i+2)-th. Its period is its largest cycle mean (Baccelli et al., "Synchronization and Linearity", 1992, theorem 2.28).
The lanes themselves give Σw and Σc. A cycle that changes lanes takes in a copies and m layers, b of them streamed, and
advances by a + b streamed layers; of n layers alike, k are streamed evenly, and then m ≤ b·n/k where n ≥ 2k or n = k,
so that no cycle is longer than the longer lane: a step takes max(Σc, Σw). For k between n/2 and n that is a lower
bound, at most a tenth below (tests/unit/cost/test_streaming_cost.py).

Out of the page cache a CPU copies with the core that computes: one buffer is enough, and the times add up, Σc + Σw.
What was copied is then still in its cache: of a layer of b bytes, in a cache of Z, the part min(1, Z/b). That part is
copied as fast as into the cache, and computed from as fast as that is read. A disk's reading takes some of the core as
well. Members of a group wait for each other in every layer, so the slowest adds its time.
"""

from collections.abc import Iterable, Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.cost.formats import Formats, parameters_bytes
from apportion.cost.roofline import AnyStep, Floats, each_overlapped_s
from apportion.cost.shard import LayerCounts, Shard
from apportion.types.cluster import Cache, Device
from apportion.types.model import LayerSpec, ModelSpec

Integers = NDArray[np.int64]
DIRECT_BYTES_PER_CORE_S = 2e10
"""Read past the page cache in a second of a core's time, which sets up the transfers: docs/benchmarks/streaming.md."""

SMALL_PAGES_BYTES = 2**20
"""Of a layer's buffer, its end: on average half of a huge page. A disk is read into small pages a third as fast."""


def streamed_bytes(shard: Shard) -> int:
    return sum(count * shard.layer_bytes(layer) for layer, count in shard.streamed)


def largest_streamed_bytes(shard: Shard) -> int:
    return max((shard.layer_bytes(layer) for layer, _ in shard.streamed), default=0)


def streaming_step_s(members: Sequence[tuple[Device, Shard]], step: AnyStep, computing_s: float) -> float:
    """Seconds of a group's step that computes for `computing_s` where it holds all its layers."""
    streamed = members[0][1].streamed
    if not streamed:
        return computing_s
    itself_s = sum(
        count * max(_shard_added_s(device, shard, layer, step.tokens) for device, shard in members)
        for layer, count in streamed
    )
    beside_s = max(_shard_arriving_s(device, shard) for device, shard in members)
    return max(computing_s + itself_s, beside_s)


def _shard_arriving_s(device: Device, shard: Shard) -> float:
    sizes = [(count, np.array(shard.layer_bytes(layer))) for layer, count in shard.streamed]
    return sum(count * float(arriving_s(device, size)) for count, size in sizes)


def _shard_added_s(device: Device, shard: Shard, layer: LayerSpec, tokens: int) -> float:
    shares = np.array(shard.kv_heads), np.array(shard.ffn_columns), np.array(shard.layer_bytes(layer))
    return float(added_s(device, shard.formats, layer, *shares, tokens))


def arriving_s(device: Device, layer_bytes: Integers) -> Floats:
    """Of a layer that arrives beside computing; 0 for one that the device copies itself."""
    slow_bytes = (
        np.minimum(layer_bytes, SMALL_PAGES_BYTES) if device.reads_disk else np.zeros_like(layer_bytes)
    )
    return np.float64(arriving_s_per_byte(device)) * (layer_bytes + 2 * slow_bytes)


def arriving_s_per_byte(device: Device) -> float:
    """At least."""
    return 1 / _rate(device) if device.stream_buffers > 1 else 0.0


def added_s(
    device: Device,
    formats: Formats,
    layer: LayerSpec,
    kv_heads: Integers,
    ffn_columns: Integers,
    layer_bytes: Integers,
    tokens: int,
) -> Floats:
    """What a layer takes longer in a step of so many tokens, of the device's own time, where it is streamed; for many
    shares at once."""
    if device.kind != "cpu":
        return np.zeros(layer_bytes.shape)
    if device.reads_disk:
        return layer_bytes / (DIRECT_BYTES_PER_CORE_S * device.speed)
    # Nothing known of a cache is one that holds nothing.
    cache = device.cache or Cache(num_bytes=0, read_bytes_per_s=inf, copied_bytes_per_s=inf)
    cached = np.minimum(1.0, cache.num_bytes / np.maximum(1, layer_bytes))
    copied_s = layer_bytes * (cached / cache.copied_bytes_per_s + (1 - cached) / _rate(device))
    rate = device.rate(formats.weights)
    assert rate is not None
    flops, read_bytes = _products(formats, layer, kv_heads, ffn_columns, tokens)
    from_memory_s = read_bytes / device.mem_bytes_per_s
    read_s = cached * read_bytes / cache.read_bytes_per_s + (1 - cached) * from_memory_s
    gained_s = each_overlapped_s(flops / rate, from_memory_s) - each_overlapped_s(flops / rate, read_s)
    return np.maximum(0.0, copied_s - gained_s)


def least_added_s_per_byte(device: Device) -> float:
    """Of the weights that a device copies itself, no layer adds less: what is cached is not read from memory again."""
    if device.kind != "cpu" or device.reads_disk:
        return 0.0
    added = [1 / _rate(device)]
    if device.cache is not None:
        gained = max(0.0, 1 / device.mem_bytes_per_s - 1 / device.cache.read_bytes_per_s)
        added.append(1 / device.cache.copied_bytes_per_s - gained)
    return max(0.0, min(added))


def _products(
    formats: Formats, layer: LayerSpec, kv_heads: Integers, ffn_columns: Integers, tokens: int
) -> tuple[Floats, Floats]:
    """(flops, bytes read) of a layer's products with its weights, attention apart: roofline.py."""
    active = layer.experts_per_token / layer.num_experts if layer.num_experts else 1.0
    touched = 1 - (1 - active) ** tokens
    head, column = layer.per_kv_head, layer.per_ffn_column
    flops = 2.0 * tokens * (kv_heads * head.count + ffn_columns * (column.count * active))
    column_bytes = parameters_bytes(column, formats) * touched
    return flops, kv_heads * parameters_bytes(head, formats) + ffn_columns * column_bytes


def _rate(device: Device) -> float:
    assert device.stream_bytes_per_s is not None
    return device.stream_bytes_per_s


def streaming_order(model: ModelSpec, layers: LayerCounts) -> LayerCounts:
    """One of each sort of weights, with the number of layers that have such: the largest first, which is the order in
    which they are streamed."""
    counts: dict[object, int] = {}
    for layer, count in layers:
        counts[_weights(layer)] = counts.get(_weights(layer), 0) + count
    return tuple((layer, counts[_weights(layer)]) for layer in _sorts(model) if _weights(layer) in counts)


def evenly_streamed(model: ModelSpec, layer_start: int, layer_stop: int, count: int) -> tuple[int, ...]:
    """Which layers of a stage are streamed where so many are: the largest first, those alike evenly spread."""
    chosen: list[int] = []
    for sort in _sorts(model):
        alike = [
            index
            for index in range(layer_start, layer_stop)
            if _weights(model.layers[index]) == _weights(sort)
        ]
        taken = min(count - len(chosen), len(alike))
        chosen += [alike[(2 * place + 1) * len(alike) // (2 * taken)] for place in range(taken)]
    return tuple(sorted(chosen))


def _weights(layer: LayerSpec) -> object:
    """Layers that differ in nothing else are alike here."""
    return layer.per_kv_head, layer.per_ffn_column, layer.replicated, layer.stored_block_bytes


def _sorts(model: ModelSpec) -> Iterable[LayerSpec]:
    """One layer of each sort of weights, the largest first."""
    first: dict[object, int] = {}
    for index, layer in enumerate(model.layers):
        first.setdefault(_weights(layer), index)
    return [model.layers[index] for index in sorted(first.values(), key=lambda i: -model.layer_parameters(i))]
