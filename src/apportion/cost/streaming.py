"""Layers whose weights are not held: in every step they come from host memory or a disk into buffers of one layer.

A GPU copies beside computing, and so does a disk, which writes to memory past the core. There are two buffers: while
one layer is computed from the first, the next streamed one arrives in the second. Steps that follow one another form an
event graph of two lanes, copies w and computing c, with an edge from computing the i-th streamed layer to copying the
(i+2)-th. Its period is its largest cycle mean (Baccelli et al., "Synchronization and Linearity", 1992, theorem 2.28).
The lanes themselves give Σw and Σc. A cycle that changes lanes takes in a copies and m layers, b of them streamed, and
advances by a + b streamed layers; of n layers alike, k are streamed evenly, and then m ≤ b·n/k where n ≥ 2k or n = k,
so that no cycle is longer than the longer lane: a step takes max(Σc, Σw). For k between n/2 and n that is a lower
bound, at most a tenth below (tests/unit/test_streaming_cost.py).

Out of the page cache a CPU copies with the core that computes: one buffer is enough, and the times add up, Σc + Σw.
"""

from apportion.cost.shard import Shard
from apportion.types.cluster import Device
from apportion.types.model import ModelSpec


def streamed_bytes(shard: Shard) -> int:
    return sum(count * shard.layer_bytes(layer) for layer, count in shard.streamed)


def largest_streamed_bytes(shard: Shard) -> int:
    return max((shard.layer_bytes(layer) for layer, _ in shard.streamed), default=0)


def streaming_step_s(device: Device, shard: Shard, computing_s: float) -> float:
    """Seconds of a step that computes for `computing_s`."""
    if not shard.streamed:
        return computing_s
    assert device.stream_bytes_per_s is not None
    copying_s = streamed_bytes(shard) / device.stream_bytes_per_s
    return computing_s + copying_s if device.stream_buffers == 1 else max(computing_s, copying_s)


def evenly_streamed(model: ModelSpec, layer_start: int, layer_stop: int, count: int) -> tuple[int, ...]:
    """Which layers of a stage are streamed where so many are: the largest first, those of one size evenly spread."""
    by_size: dict[int, list[int]] = {}
    for index in range(layer_start, layer_stop):
        by_size.setdefault(model.layer_parameters(index), []).append(index)
    chosen: list[int] = []
    for _, alike in sorted(by_size.items(), reverse=True):
        taken = min(count - len(chosen), len(alike))
        chosen += [alike[(2 * place + 1) * len(alike) // (2 * taken)] for place in range(taken)]
    return tuple(sorted(chosen))
