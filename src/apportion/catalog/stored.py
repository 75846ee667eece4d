"""A ModelSpec with the bytes that its quantised files hold, by the axes along which a group cuts them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Literal

from apportion.types.model import LayerSpec, ModelSpec, StoredWeights

Part = Literal["attention", "ffn", "replicated", "embedding", "head", "outside", "beside_embedding"]
"""Of a layer: cut by KV heads, by FFN columns, or on every member. Of the rest: a vocabulary table, or neither,
with the head or with the embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor, or several of a part taken together."""

    layer: int | None
    part: Part
    num_bytes: int
    block_elements: int = 1
    """Of a quantisation block along the inputs, where it is these that a group cuts."""


def with_stored(
    spec: ModelSpec,
    weight_format: str,
    container: Literal["gguf", "safetensors"],
    tensors: Iterable[StoredTensor],
) -> ModelSpec:
    """What an axis leaves over when it is divided into units is replicated, so that the whole is exact."""
    by_layer: dict[int | None, list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        by_layer[tensor.layer].append(tensor)
    outside = _sums(by_layer[None])
    block_columns = _ffn_block_columns(spec, by_layer)
    embedding_row_bytes, embedding_rest = divmod(outside["embedding"], spec.vocab_rows)
    head_row_bytes, head_rest = divmod(outside["head"], spec.vocab_rows)
    return replace(
        spec,
        layers=tuple(
            _layer(spec, layer, by_layer[number], block_columns) for number, layer in enumerate(spec.layers)
        ),
        stored=StoredWeights(
            format=weight_format,
            container=container,
            embedding_row_bytes=embedding_row_bytes,
            head_row_bytes=embedding_row_bytes if spec.tied_embeddings else head_row_bytes,
            outside_bytes=outside["outside"] + embedding_rest + head_rest,
            ffn_block_columns=block_columns,
            beside_embedding_bytes=outside["beside_embedding"],
        ),
    )


def _ffn_block_columns(spec: ModelSpec, by_layer: Mapping[int | None, Sequence[StoredTensor]]) -> int:
    columns = lcm(
        *(
            tensor.block_elements // gcd(tensor.block_elements, ffn_width(spec, layer) // spec.ffn_columns)
            for number, layer in enumerate(spec.layers)
            for tensor in by_layer[number]
            if tensor.part == "ffn"
        )
    )
    return columns if spec.ffn_columns % columns == 0 else 1


def _layer(
    spec: ModelSpec, layer: LayerSpec, tensors: Sequence[StoredTensor], ffn_block_columns: int
) -> LayerSpec:
    sums = _sums(tensors)
    head_bytes, attention_rest = divmod(sums["attention"], spec.kv_heads)
    column_bytes, ffn_rest = divmod(sums["ffn"], spec.ffn_columns)
    return replace(
        layer,
        per_kv_head=replace(layer.per_kv_head, stored_bytes=head_bytes),
        per_ffn_column=replace(layer.per_ffn_column, stored_bytes=column_bytes),
        replicated=replace(layer.replicated, stored_bytes=sums["replicated"] + attention_rest + ffn_rest),
        stored_block_bytes=sum(
            _block_bytes(spec, layer, tensor)
            for tensor in tensors
            if tensor.part == "attention" or ffn_block_columns == 1
        ),
    )


def _sums(tensors: Iterable[StoredTensor]) -> dict[Part, int]:
    sums: dict[Part, int] = defaultdict(int)
    for tensor in tensors:
        sums[tensor.part] += tensor.num_bytes
    return sums


def _block_bytes(spec: ModelSpec, layer: LayerSpec, tensor: StoredTensor) -> int:
    """One block of every row; none where KV heads end where blocks do."""
    if tensor.block_elements == 1:
        return 0
    if tensor.part == "attention":
        # Of latent attention the value's width is not in the spec; it is a multiple of every block.
        per_head = 0 if spec.kv_lora_rank else spec.q_heads_per_kv_head * spec.head_dim
        inputs = spec.q_heads * spec.head_dim if per_head % tensor.block_elements else 0
    else:
        inputs = ffn_width(spec, layer)
    return -(-tensor.num_bytes * tensor.block_elements // inputs) if inputs else 0


def ffn_width(spec: ModelSpec, layer: LayerSpec) -> int:
    """Of a dense FFN, or of one expert."""
    columns = layer.per_ffn_column.elements // (3 * spec.hidden_size)
    return spec.ffn_columns * columns // max(1, layer.num_experts)
