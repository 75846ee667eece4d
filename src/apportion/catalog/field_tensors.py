"""The tensors that a config's fields describe, where neither files nor transformers' classes are at hand.

Layers are taken to be of the common form: grouped or latent attention, a gated FFN or experts with those shared;
`block_configs` (Nemotron's searched architectures) say otherwise of each layer.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import cast

from apportion.catalog.config_fields import ConfigFields
from apportion.catalog.facts import Facts
from apportion.catalog.tensor_roles import NamedTensor

_SHARED_WIDTHS = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "share_expert_dim",
)
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_FFN_WIDTHS = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
_BLOCK_MULTIPLE = 256
"""To which searched FFN widths are rounded up (DeciLM's `_ffn_mult_to_intermediate_size`)."""


def tensors_of_fields(fields: ConfigFields, facts: Facts) -> list[NamedTensor]:
    """Raises ModelError."""
    hidden, vocab = fields.positive("hidden_size"), fields.positive("vocab_size")
    tensors = [_matrix("model.embed_tokens.weight", vocab, hidden), _vector("model.norm.weight", hidden)]
    if not fields.flag("tie_word_embeddings"):
        tensors.append(_matrix("lm_head.weight", vocab, hidden))
    blocks = fields.items("block_configs")
    for number in range(facts.num_layers):
        prefix = f"model.layers.{number}."
        if blocks is not None:
            layer = _block(fields, facts, blocks, number, hidden)
        else:
            layer = [*_attention(fields, facts, hidden), *_ffn(fields, number, hidden)]
        tensors += [NamedTensor.of_shape(prefix + name, shape) for name, shape in (*layer, *_norms(hidden))]
    return tensors


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _matrix(name: str, rows: int, columns: int) -> NamedTensor:
    return NamedTensor.of_shape(name, (rows, columns))


def _vector(name: str, size: int) -> NamedTensor:
    return NamedTensor.of_shape(name, (size,))


def _norms(hidden: int) -> Shapes:
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def _attention(fields: ConfigFields, facts: Facts, hidden: int) -> Shapes:
    heads = facts.heads
    if facts.latent_rank is not None:
        yield from _latent(fields, facts.latent_rank, heads, hidden)
        return
    head_dim = fields.optional_positive("head_dim") or max(1, hidden // heads)
    yield from _grouped(heads, fields.optional_positive("num_key_value_heads") or heads, head_dim, hidden)


def _grouped(heads: int, kv_heads: int, head_dim: int, hidden: int) -> Shapes:
    yield "self_attn.q_proj.weight", (heads * head_dim, hidden)
    yield "self_attn.k_proj.weight", (kv_heads * head_dim, hidden)
    yield "self_attn.v_proj.weight", (kv_heads * head_dim, hidden)
    yield "self_attn.o_proj.weight", (hidden, heads * head_dim)


def _latent(fields: ConfigFields, rank: int, heads: int, hidden: int) -> Shapes:
    rope, nope = fields.positive("qk_rope_head_dim"), fields.positive("qk_nope_head_dim")
    value, q_rank = fields.positive("v_head_dim"), fields.optional_positive("q_lora_rank")
    if q_rank:
        yield "self_attn.q_a_proj.weight", (q_rank, hidden)
    name = "q_b_proj" if q_rank else "q_proj"
    yield f"self_attn.{name}.weight", (heads * (nope + rope), q_rank or hidden)
    yield "self_attn.kv_a_proj_with_mqa.weight", (rank + rope, hidden)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), rank)
    yield "self_attn.o_proj.weight", (hidden, heads * value)


def _ffn(fields: ConfigFields, number: int, hidden: int) -> Shapes:
    experts = _first(fields, _EXPERTS)
    dense_first = fields.get("first_k_dense_replace")
    if not experts or (isinstance(dense_first, int) and number < dense_first):
        yield from _gated("mlp", _width(fields, _FFN_WIDTHS), hidden)
        return
    width = _width(fields, _EXPERT_WIDTHS)
    yield "mlp.gate.weight", (experts, hidden)
    yield "mlp.experts.gate_up_proj", (experts, 2 * width, hidden)
    yield "mlp.experts.down_proj", (experts, hidden, width)
    shared = _first(fields, _SHARED_WIDTHS) or width * (fields.optional_positive("n_shared_experts") or 0)
    if shared:
        yield from _gated("mlp.shared_experts", shared, hidden)


def _gated(module: str, width: int, hidden: int) -> Shapes:
    yield f"{module}.gate_proj.weight", (width, hidden)
    yield f"{module}.up_proj.weight", (width, hidden)
    yield f"{module}.down_proj.weight", (hidden, width)


def _block(fields: ConfigFields, facts: Facts, blocks: list[object], number: int, hidden: int) -> Shapes:
    """Of a searched architecture: attention with so many query heads in a group, a linear layer instead, or nothing."""
    if number >= len(blocks):
        raise fields.invalid("block_configs", f"a list of {facts.num_layers} blocks")
    attention, ffn = (_part(fields, blocks[number], name) for name in ("attention", "ffn"))
    if attention.get("replace_with_linear"):
        yield "self_attn.linear_attn.weight", (hidden, hidden)
    elif not attention.get("no_op"):
        in_group = attention.optional_positive("n_heads_in_group") or 1
        head_dim = fields.optional_positive("head_dim") or max(1, hidden // facts.heads)
        yield from _grouped(facts.heads, max(1, facts.heads // in_group), head_dim, hidden)
    if ffn.get("replace_with_linear"):
        yield "mlp.linear_mlp.weight", (hidden, hidden)
    elif not ffn.get("no_op"):
        yield from _gated("mlp", _block_width(ffn, hidden), hidden)


def _part(fields: ConfigFields, block: object, name: str) -> ConfigFields:
    part = cast(dict[str, object], block).get(name) if isinstance(block, dict) else None
    if not isinstance(part, dict):
        raise ConfigFields(fields.file, {"block_configs": name}, {}).invalid(
            "block_configs", "a list of blocks with 'attention' and 'ffn'"
        )
    return ConfigFields(fields.file, cast(dict[str, object], part), {})


def _block_width(ffn: ConfigFields, hidden: int) -> int:
    """Two thirds of so many times the hidden size, rounded up."""
    width, multiple = ffn.optional_positive("intermediate_size"), ffn.get("ffn_mult")
    if width is not None:
        return width
    if not isinstance(multiple, int | float) or isinstance(multiple, bool) or not 0 < multiple < 1000:
        raise ffn.invalid("ffn_mult", "a number")
    return _BLOCK_MULTIPLE * -(-int(2 * Fraction(multiple) * hidden / 3) // _BLOCK_MULTIPLE)


def _first(fields: ConfigFields, names: tuple[str, ...]) -> int | None:
    return next((fields.optional_positive(name) for name in names if fields.get(name) is not None), None)


def _width(fields: ConfigFields, names: tuple[str, ...]) -> int:
    return _first(fields, names) or fields.positive(names[0])
