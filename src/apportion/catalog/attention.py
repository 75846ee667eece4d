"""What a layer's attention holds: per KV head with its query heads, and replicated on every member of a group."""

from dataclasses import dataclass

from apportion.catalog.config_fields import ConfigFields
from apportion.catalog.families import Family, Presence
from apportion.types.model import Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """`head_dim`, `kv_lora_rank` as in ModelSpec. The output bias is replicated: it is added after a reduction."""

    q_heads: int
    kv_heads: int
    head_dim: int
    per_kv_head: Parameters
    replicated: Parameters
    kv_lora_rank: int | None


def read_attention(fields: ConfigFields, family: Family) -> Attention:
    """Raises ModelError."""
    return _latent(fields, family) if family.latent else _grouped(fields, family)


def present(fields: ConfigFields, presence: Presence) -> bool:
    return presence == "always" or (presence != "never" and fields.flag(presence))


def _grouped(fields: ConfigFields, family: Family) -> Attention:
    hidden_size, q_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    kv_heads = fields.optional_positive("num_key_value_heads") or q_heads
    head_dim = _head_dim(fields, hidden_size, q_heads, kv_heads)
    q_width, kv_width = q_heads // kv_heads * head_dim, head_dim
    qkv_rows = q_width + 2 * kv_width
    biases = present(fields, family.qkv_bias) * qkv_rows
    wide_norms = q_width + kv_width if family.qk_norm == "wide" else 0
    sinks = q_heads // kv_heads if family.sinks else 0
    return Attention(
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        per_kv_head=Parameters(
            elements=(qkv_rows + q_width) * hidden_size,
            rows=qkv_rows,
            others=biases + wide_norms + sinks,
        ),
        replicated=Parameters(
            elements=0,
            rows=hidden_size,
            others=_output_bias(fields, family) + (2 * head_dim if _head_norms(fields, family) else 0),
        ),
        kv_lora_rank=None,
    )


def _head_dim(fields: ConfigFields, hidden_size: int, q_heads: int, kv_heads: int) -> int:
    head_dim = fields.optional_positive("head_dim")
    if q_heads % kv_heads:
        raise fields.invalid("num_key_value_heads", f"a divisor of num_attention_heads ({q_heads})")
    if head_dim is None and hidden_size % q_heads:
        raise fields.invalid(
            "hidden_size", f"a multiple of num_attention_heads ({q_heads}), or head_dim given"
        )
    return head_dim or hidden_size // q_heads


def _head_norms(fields: ConfigFields, family: Family) -> bool:
    return family.qk_norm == "head" or (family.qk_norm == "use_qk_norm" and fields.flag("use_qk_norm"))


def _output_bias(fields: ConfigFields, family: Family) -> int:
    return present(fields, family.output_bias) * fields.positive("hidden_size")


def _latent(fields: ConfigFields, family: Family) -> Attention:
    """Each query head is a unit of its own; the projections down to the latents, and their norms, are replicated."""
    hidden_size, heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    rank, rope_dim = fields.positive("kv_lora_rank"), fields.positive("qk_rope_head_dim")
    nope_dim, value_dim = fields.positive("qk_nope_head_dim"), fields.positive("v_head_dim")
    q_rank = fields.optional_positive("q_lora_rank")
    down_rows = rank + rope_dim + (q_rank or 0)
    norms = rank + (q_rank or 0)
    biases = fields.flag("attention_bias") * down_rows
    per_head = (q_rank or hidden_size) * (nope_dim + rope_dim) + rank * (nope_dim + value_dim)
    return Attention(
        q_heads=heads,
        kv_heads=heads,
        head_dim=rank + rope_dim,
        per_kv_head=Parameters(
            elements=per_head + value_dim * hidden_size,
            rows=(nope_dim + rope_dim) + (nope_dim + value_dim),
            others=0,
        ),
        replicated=Parameters(
            elements=down_rows * hidden_size,
            rows=down_rows + hidden_size,
            others=norms + biases + _output_bias(fields, family),
        ),
        kv_lora_rank=rank,
    )
