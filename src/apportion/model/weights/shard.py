"""Which part of each parameter a member of a stage holds, and where the checkpoint keeps it.

The layout of transformers' layers is written down for no family: a layer is built on the meta device from the full
config and from configs with one axis shrunk to the member's share; a dimension that shrinks is sharded along that axis.
Only the order of fused projections (`_segments`) and the names in checkpoints are data.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from apportion.model.weights.checkpoint import Range
from apportion.types.model import ModelSpec
from apportion.types.plan import Stage

Axis = Literal["heads", "ffn"]
Shape = tuple[int, ...]

_RENAMED = {"mixtral": {"mlp.gate.weight": "block_sparse_moe.gate.weight"}}
"""Parameters of a layer that the checkpoint names otherwise, by family."""

_STORED_PER_EXPERT = {
    "mixtral": {
        "mlp.experts.gate_up_proj": (
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
        ),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.{}.w2.weight",),
    },
    "qwen3_moe": {
        "mlp.experts.gate_up_proj": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
    },
}
"""Parameters of a layer that the checkpoint stores as one tensor per expert (`{}`) and projection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The units `[start, stop)` of an axis of `units`."""

    start: int
    stop: int
    units: int

    @classmethod
    def of(cls, shares: tuple[int, ...], rank: int) -> "Share":
        stops = tuple(accumulate(shares))
        return cls(start=stops[rank] - shares[rank], stop=stops[rank], units=stops[-1])

    @property
    def count(self) -> int:
        return self.stop - self.start

    def scaled(self, size: int) -> int:
        """The share of a dimension of `size` elements."""
        return size * self.count // self.units

    def within(self, segment_start: int, segment_size: int) -> Range:
        """The share of a segment of a dimension, in elements from the dimension's start."""
        assert segment_size % self.units == 0, (
            f"{segment_size} elements do not divide into {self.units} units"
        )
        width = segment_size // self.units
        return segment_start + self.start * width, segment_start + self.stop * width


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShares:
    """What one member holds along every axis. Heads are counted in KV heads with the query heads they serve."""

    heads: Share
    ffn: Share
    vocab: Share

    @classmethod
    def of(cls, model: ModelSpec, stage: Stage, rank: int) -> "RankShares":
        split = stage.split
        shares = cls(
            heads=Share.of(split.kv_heads, rank),
            ffn=Share.of(split.ffn_columns, rank),
            vocab=Share.of(split.vocab_rows, rank),
        )
        assert shares.heads.units == model.kv_heads
        assert shares.ffn.units == model.ffn_columns
        assert shares.vocab.units == model.vocab_rows
        assert split.q_heads[rank] == shares.heads.count * model.q_heads_per_kv_head
        assert min(shares.heads.count, shares.ffn.count, shares.vocab.count) >= 1
        return shares

    def along(self, axis: Axis) -> Share:
        return self.heads if axis == "heads" else self.ffn


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedDim:
    """Dimension `dim` of a parameter holds the member's share of each of its `segments` (sizes, in order)."""

    dim: int
    segments: tuple[int, ...]
    share: Share

    @property
    def ranges(self) -> tuple[Range, ...]:
        starts = (0, *accumulate(self.segments))
        return tuple(
            self.share.within(start, size) for start, size in zip(starts, self.segments, strict=False)
        )

    def local_shape(self, full: Shape) -> Shape:
        """The shape of the member's part."""
        size = sum(stop - start for start, stop in self.ranges)
        return (*full[: self.dim], size, *full[self.dim + 1 :])


def sharded_dim(
    name: str, full: Shape, shrunk: dict[Axis, Shape], model: ModelSpec, shares: RankShares
) -> ShardedDim | None:
    """How `name` is sharded, from its full shape and its shape with each axis shrunk; None if replicated."""
    found = [
        ShardedDim(dim=dim, segments=_segments(name, full[dim], model), share=shares.along(axis))
        for axis, shape in shrunk.items()
        for dim in range(len(full))
        if shape[dim] != full[dim]
    ]
    assert len(found) <= 1, f"{name} is sharded along {len(found)} dimensions"
    for sharded in found:
        assert sharded.local_shape(full) in shrunk.values(), f"{name}: {full} -> {shrunk}"
    return found[0] if found else None


def _segments(name: str, size: int, model: ModelSpec) -> tuple[int, ...]:
    """Sizes of the projections fused along one dimension. gpt_oss interleaves gate and up, so that a column's
    two elements stand side by side: one segment."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if leaf == "qkv_proj":
        q_size, kv_size = model.q_heads * model.head_dim, model.kv_heads * model.head_dim
        return q_size, kv_size, kv_size
    if leaf == "gate_up_proj" and model.family != "gpt_oss":
        return size // 2, size // 2
    return (size,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """`ranges` of checkpoint tensor `source`, whose shape is `source_shape`, fill the parameter's `target`."""

    source: str
    source_shape: Shape
    ranges: tuple[Range, ...]
    target: tuple[slice | int, ...]


def placements(
    prefix: str, name: str, family: str, stored: Container[str], full: Shape, sharded: ShardedDim | None
) -> Iterator[Placement]:
    """Reads that fill the member's part of parameter `prefix + name`, whole in shape `full`.

    `stored` are the checkpoint's names: a checkpoint that has the parameter as it is, is read as it is.
    """
    per_expert = _STORED_PER_EXPERT.get(family, {}).get(name)
    if per_expert is not None and prefix + name not in stored:
        yield from _expert_placements(tuple(prefix + source for source in per_expert), full, sharded)
        return
    renamed = prefix + _RENAMED.get(family, {}).get(name, name)
    yield from whole_placements(renamed if renamed in stored else prefix + name, full, sharded)


def whole_placements(source: str, full: Shape, sharded: ShardedDim | None) -> Iterator[Placement]:
    """Reads that fill a parameter stored whole under the name `source`."""
    whole = tuple((0, size) for size in full)
    if sharded is None:
        yield Placement(source=source, source_shape=full, ranges=whole, target=())
        return
    filled = 0
    for start, stop in sharded.ranges:
        yield Placement(
            source=source,
            source_shape=full,
            ranges=_replaced(whole, sharded.dim, (start, stop)),
            target=(*[slice(None)] * sharded.dim, slice(filled, filled + stop - start)),
        )
        filled += stop - start


def _expert_placements(
    sources: tuple[str, ...], full: Shape, sharded: ShardedDim | None
) -> Iterator[Placement]:
    """Reads that fill a parameter [expert, ...] stored as one tensor per expert and segment; `{}` in a source's
    name is the expert. The segments are stacked along dimension 1, and each is stored from 0."""
    num_experts, stacked_size, *rest = full
    source_shape = (stacked_size // len(sources), *rest)
    ranges = tuple((0, size) for size in source_shape)
    if sharded is not None:
        ranges = _replaced(ranges, sharded.dim - 1, sharded.share.within(0, sharded.segments[0]))
    rows = ranges[0][1] - ranges[0][0]
    for expert in range(num_experts):
        for segment, source in enumerate(sources):
            yield Placement(
                source=source.format(expert),
                source_shape=source_shape,
                ranges=ranges,
                target=(expert, slice(segment * rows, (segment + 1) * rows)),
            )


def _replaced(ranges: tuple[Range, ...], dim: int, value: Range) -> tuple[Range, ...]:
    return (*ranges[:dim], value, *ranges[dim + 1 :])
