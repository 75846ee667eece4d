"""One member's part of a stage, reduced to the counts that its cost depends on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from apportion.cost.formats import Formats, parameters_bytes
from apportion.types.model import LayerSpec, ModelSpec
from apportion.types.plan import Stage

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
    formats: Formats
    has_embedding: bool
    has_head: bool
    streamed: LayerCounts = ()
    """Those of `layers` whose weights are streamed."""

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.layers)

    def layer_parameters(self, layer: LayerSpec) -> int:
        return (
            self.kv_heads * layer.per_kv_head.count
            + self.ffn_columns * layer.per_ffn_column.count
            + layer.replicated.count
        )

    def layer_bytes(self, layer: LayerSpec) -> int:
        """Of one layer's weights."""
        return (
            self.kv_heads * parameters_bytes(layer.per_kv_head, self.formats)
            + self.ffn_columns * parameters_bytes(layer.per_ffn_column, self.formats)
            + parameters_bytes(layer.replicated, self.formats)
            + (layer.stored_block_bytes if self.formats.as_stored and self.rank > 0 else 0)
        )


def layer_counts(layers: Sequence[LayerSpec]) -> LayerCounts:
    return tuple(Counter(layers).items())


def stage_formats(stage: Stage) -> Formats:
    return Formats(weights=stage.weight_format, activations=stage.activation_format, kv=stage.kv_format)


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
            formats=stage_formats(stage),
            has_embedding=stage.has_embedding,
            has_head=stage.has_head,
            streamed=streamed,
        )
        for rank in range(split.size)
    )
