"""A model as if quantised in a way that is named (`q4_k_m`, `awq`, `nvfp4`, `mlx-4bit`), without such files."""

import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from apportion.catalog.ggml_mixes import BASES, BLOCKS, Mix, Module
from apportion.catalog.quantisation import FP8, MXFP4, MXFP8, NVFP4, SCALE_BITS, Quantisation, blocks
from apportion.catalog.quantised_config import DOWN_SHARE, with_formula
from apportion.catalog.stored import Part, StoredTensor, ffn_width, with_stored
from apportion.types.model import LayerSpec, ModelSpec

_GROUP = 128
_NORM_BYTES = 4
"""GGUF keeps norms, biases and routers in fp32."""
_GPTQ = {
    bits: replace(blocks(f"gptq-int{bits}", bits, _GROUP, SCALE_BITS + bits), input_bytes=4)
    for bits in (2, 3, 4, 8)
}
_MLX = {bits: blocks(f"mlx-{bits}bit", bits, 64, 2 * SCALE_BITS) for bits in (2, 3, 4, 5, 6, 8)}
_METHODS = {
    "fp8": FP8,
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
    "mxfp8": MXFP8,
    "awq-int4": blocks("awq-int4", 4, _GROUP, SCALE_BITS + 4),
    **{method.name: method for method in _GPTQ.values()},
    **{
        method.name: replace(method, head_bits=method.element_bits, embedding_bits=method.element_bits)
        for method in _MLX.values()
    },
    "bnb-nf4": blocks("bnb-nf4", 4, 64, 32),
    "bnb-int8": Quantisation(name="bnb-int8", bits=8, row_bytes=4),
    "hqq-int4": blocks("hqq-int4", 4, 64, 2 * SCALE_BITS),
}
_MEANT = {
    "awq": "awq-int4",
    "gptq": "gptq-int4",
    "mlx": "mlx-4bit",
    "nf4": "bnb-nf4",
    "bnb": "bnb-nf4",
    "hqq": "hqq-int4",
}
_EXL3 = re.compile(r"exl3-(\d(?:\.\d+)?)bpw")
NAMED_WEIGHTS = (*BASES, *_METHODS, "exl3-4bpw")
"""By which a user may name weights; of EXL3 any number of bits from 1 to 8."""


def named_weights(name: str) -> str | None:
    """The name as it stands in a plan; None for what is no such name."""
    spelt = name.strip().lower()
    ggml = spelt.replace("-", "_")
    if ggml in BASES:
        return ggml
    dashed = spelt.replace("_", "-")
    exl3 = _EXL3.fullmatch(dashed)
    if exl3 and 1 <= float(exl3[1]) <= 8:
        return dashed
    known = _MEANT.get(dashed, dashed)
    return known if known in _METHODS else None


def with_named_weights(spec: ModelSpec, name: str) -> ModelSpec:
    """`name` as `named_weights` gives it."""
    if name in BASES:
        return with_stored(spec, name, "gguf", _mixed(spec, name))
    exl3 = _EXL3.fullmatch(name)
    if exl3:
        bits = Fraction(exl3[1])
        method = Quantisation(
            name=name,
            bits=int(bits),
            group_bits=bits - int(bits),
            row_bytes=2,
            input_bytes=2,
            block_elements=128,
            head_bits=Fraction(6),
        )
    else:
        method = _METHODS[name]
    if name == "mxfp4" and any(layer.num_experts for layer in spec.layers):
        method = replace(method, experts_only=True)
    return with_formula(spec, method)


def _mixed(spec: ModelSpec, kind: str) -> Iterator[StoredTensor]:
    mix = Mix(
        kind=kind,
        num_layers=spec.num_layers,
        q_heads_per_kv_head=spec.q_heads_per_kv_head,
        num_experts=max(layer.num_experts for layer in spec.layers),
    )
    table, width = spec.embedding_params, spec.hidden_size
    looked_up = "output" if spec.tied_embeddings else "embedding"
    yield StoredTensor(layer=None, part="embedding", num_bytes=mix.num_bytes(looked_up, 0, width, table))
    if not spec.tied_embeddings:
        yield StoredTensor(layer=None, part="head", num_bytes=mix.num_bytes("output", 0, width, table))
    yield StoredTensor(layer=None, part="outside", num_bytes=_NORM_BYTES * width)
    beside = mix.num_bytes("embedding", 0, width, spec.beside_embedding)
    yield StoredTensor(layer=None, part="beside_embedding", num_bytes=beside)
    for number, layer in enumerate(spec.layers):
        yield from _layer(spec, layer, number, mix)


def _layer(spec: ModelSpec, layer: LayerSpec, number: int, mix: Mix) -> Iterator[StoredTensor]:
    hidden, attention = spec.hidden_size, spec.kv_heads * layer.per_kv_head.elements
    latent = spec.kv_lora_rank is not None
    cached = 0 if latent else spec.kv_heads * (spec.kv_elements(layer, 1) - spec.kv_elements(layer, 0))
    value = key = min(hidden * cached // 2, attention // 2)
    width = spec.q_heads * spec.head_dim
    output = 0 if latent else min(hidden * width, attention - value - key)
    query = attention - value - key - output
    parts: tuple[tuple[Module, int], ...] = (("q", query), ("k", key), ("v", value))
    size = sum(mix.num_bytes(module, number, hidden, elements) for module, elements in parts)
    yield StoredTensor(
        layer=number, part="attention", num_bytes=size + _beside(spec.kv_heads, layer.per_kv_head.others)
    )
    yield _inputs_cut(number, "attention", mix, "o", width, output)
    ffn = spec.ffn_columns * layer.per_ffn_column.elements
    down, row = ffn // DOWN_SHARE, ffn_width(spec, layer)
    size = mix.num_bytes("up", number, hidden, ffn - down)
    yield StoredTensor(
        layer=number, part="ffn", num_bytes=size + _beside(spec.ffn_columns, layer.per_ffn_column.others)
    )
    yield _inputs_cut(number, "ffn", mix, "down", row, down)
    size = (
        mix.num_bytes("q", number, hidden, layer.replicated.elements) + _NORM_BYTES * layer.replicated.others
    )
    yield StoredTensor(layer=number, part="replicated", num_bytes=size)


def _beside(units: int, others: int) -> int:
    return units * others * _NORM_BYTES


def _inputs_cut(number: int, part: Part, mix: Mix, module: Module, row: int, elements: int) -> StoredTensor:
    block, _ = BLOCKS[mix.type_of(module, number, row)]
    return StoredTensor(
        layer=number, part=part, num_bytes=mix.num_bytes(module, number, row, elements), block_elements=block
    )
