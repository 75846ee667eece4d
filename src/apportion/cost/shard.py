"""One member's part of a stage, reduced to the counts that its cost depends on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from apportion.types.model import LayerSpec, ModelSpec
from apportion.types.plan import Stage
from apportion.types.units import FORMAT_BYTES

LayerCounts = tuple[tuple[LayerSpec, int], ...]
"""How many layers of each kind, in order of first appearance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What rank `rank` of a stage's `size` members holds."""

    layers: LayerCounts
    kv_heads: int
    ffn_columns: int
    vocab_rows: int
    rank: int
    size: int
    weight_format: str
    has_embedding: bool
    has_head: bool
    streamed: LayerCounts = ()
    """Those of `layers` whose weights are streamed."""

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.layers)

    @property
    def element_bytes(self) -> int:
        return FORMAT_BYTES[self.weight_format]


def layer_counts(layers: Sequence[LayerSpec]) -> LayerCounts:
    return tuple(Counter(layers).items())


def stage_shards(model: ModelSpec, stage: Stage) -> tuple[Shard, ...]:
    """The shards of a stage's members, in rank order."""
    layers = layer_counts(model.layers[stage.layer_start : stage.layer_stop])
    streamed = layer_counts([model.layers[index] for index in stage.streamed_layers])
    split = stage.split
    return tuple(
        Shard(
            layers=layers,
            kv_heads=split.kv_heads[rank],
            ffn_columns=split.ffn_columns[rank],
            vocab_rows=split.vocab_rows[rank],
            rank=rank,
            size=split.size,
            weight_format=stage.weight_format,
            has_embedding=stage.has_embedding,
            has_head=stage.has_head,
            streamed=streamed,
        )
        for rank in range(split.size)
    )
