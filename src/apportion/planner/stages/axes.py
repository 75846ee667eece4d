"""The units in which a group's shares are counted, and how much of them each member's memory holds.

FFN columns come in granules: the largest power of two ≤ 16 that divides them, or the quantisation blocks of the model's
own files, which are not cut. KV heads come one by one; where there are more than 5000 ways to share them, in the
smallest granules that divide them and leave no more, and as evenly as can be. Vocabulary rows follow the FFN columns by
cumulative rounding, and a member has room for its rows rounded up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, combinations, pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

from apportion.cost.formats import Formats
from apportion.cost.memory import Capacity, shard_memory
from apportion.cost.shard import LayerCounts, Shard
from apportion.types.cluster import Device
from apportion.types.model import ModelSpec

MAX_COMPOSITIONS = 5000

IntArray = NDArray[np.int64]


def ffn_granule(model: ModelSpec) -> int:
    if model.stored is not None and model.stored.ffn_block_columns > 1:
        return model.stored.ffn_block_columns
    return next(size for size in (16, 8, 4, 2, 1) if model.ffn_columns % size == 0)


@lru_cache(maxsize=64)
def compositions(total: int, parts: int) -> IntArray:
    """Every way to write `total` as a sum of `parts` positive numbers."""
    cuts = np.array(list(combinations(range(1, total), parts - 1)), dtype=np.int64)
    cuts = cuts.reshape(comb(total - 1, parts - 1), parts - 1)
    return np.diff(cuts, axis=1, prepend=0, append=total)


@lru_cache(maxsize=64)
def head_compositions(kv_heads: int, group_size: int) -> IntArray:
    """The ways to share the KV heads that are looked at, one row each, every member holding at least one head: all in
    granules, and the most even one."""
    if group_size > kv_heads:
        return np.empty((0, group_size), dtype=np.int64)
    granule = _head_granule(kv_heads, group_size)
    units = kv_heads // granule
    rows = granule * compositions(units, group_size)
    even = np.diff(kv_heads * np.arange(group_size + 1) // group_size)
    return rows if (rows == even).all(axis=1).any() else np.append(rows, even[None], axis=0)


def _head_granule(kv_heads: int, group_size: int) -> int:
    """The fewest KV heads that are shared out together so that there are not too many ways."""
    divisors = (size for size in range(1, kv_heads + 1) if kv_heads % size == 0)
    return next(size for size in divisors if comb(kv_heads // size - 1, group_size - 1) <= MAX_COMPOSITIONS)


def vocabulary_rows(vocab_rows: int, ffn_units: Sequence[int]) -> tuple[int, ...]:
    """Rows in the ratio of the FFN units, by rounding the running sum."""
    total = sum(ffn_units)
    stops = [0]
    running = 0
    for units in ffn_units:
        running += units
        stops.append((2 * vocab_rows * running + total) // (2 * total))
    return tuple(stop - start for start, stop in pairwise(stops))


def shared_in_ratio(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """In the ratio of the weights, by rounding the running sum, and at least one each."""
    stops = [0]
    for number, running in enumerate(accumulate(weights), start=1):
        stop = (2 * total * running + sum(weights)) // (2 * sum(weights))
        stops.append(min(max(stop, stops[-1] + 1), total - (len(weights) - number)))
    return tuple(stop - start for start, stop in pairwise(stops))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageKind:
    """All that a stage's cost on given devices depends on."""

    layers: LayerCounts
    has_embedding: bool
    has_head: bool


@dataclass(frozen=True, slots=True)
class Room:
    """One member's memory, affine in its shares: bytes of nothing, of a head, an FFN granule, a vocabulary row."""

    free_bytes: int
    head_bytes: int
    granule_bytes: int
    row_bytes: int
    num_granules: int
    vocab_rows: int

    def fits(self, kv_heads: int, granules: int) -> bool:
        rows = -(-self.vocab_rows * granules // self.num_granules)
        needed = kv_heads * self.head_bytes + granules * self.granule_bytes + rows * self.row_bytes
        return needed <= self.free_bytes

    def granules(self, kv_heads: int) -> int:
        """The most FFN granules that fit beside this many heads; 0 where none does."""
        left = self.free_bytes - kv_heads * self.head_bytes
        whole = self.granule_bytes * self.num_granules + self.row_bytes * self.vocab_rows
        most = min(self.num_granules, max(0, left) * self.num_granules // whole)
        while most > 0 and not self.fits(kv_heads, most):
            most -= 1
        return most

    def granules_beside(self, kv_heads: IntArray) -> IntArray:
        """`granules` of each."""
        left = self.free_bytes - kv_heads * self.head_bytes
        whole = self.granule_bytes * self.num_granules + self.row_bytes * self.vocab_rows
        most = np.minimum(self.num_granules, np.maximum(0, left) * self.num_granules // whole)
        while True:
            rows = -(-self.vocab_rows * most // self.num_granules)
            beyond = (most > 0) & (most * self.granule_bytes + rows * self.row_bytes > left)
            if not beyond.any():
                return most
            most -= beyond


def member_room(
    model: ModelSpec,
    capacity: Capacity,
    formats: Formats,
    device: Device,
    rank: int,
    size: int,
    kind: StageKind,
) -> Room:
    granule = ffn_granule(model)

    def engine_bytes(heads: int, columns: int, rows: int) -> int:
        shard = make_shard(kind, formats, rank, size, heads, columns, rows)
        return shard_memory(model, shard, capacity, device).engine_bytes

    nothing = engine_bytes(0, 0, 0)
    return Room(
        free_bytes=device.usable_bytes - nothing,
        head_bytes=engine_bytes(1, 0, 0) - nothing,
        granule_bytes=engine_bytes(0, granule, 0) - nothing,
        row_bytes=engine_bytes(0, 0, 1) - nothing,
        num_granules=model.ffn_columns // granule,
        vocab_rows=model.vocab_rows,
    )


def make_shard(
    kind: StageKind, formats: Formats, rank: int, size: int, heads: int, columns: int, rows: int
) -> Shard:
    return Shard(
        layers=kind.layers,
        kv_heads=heads,
        ffn_columns=columns,
        vocab_rows=rows,
        rank=rank,
        size=size,
        formats=formats,
        has_embedding=kind.has_embedding,
        has_head=kind.has_head,
    )
