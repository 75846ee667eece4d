"""A model's config.json as a ModelSpec: exact parameter counts per layer and axis, without torch.

The layouts are declared in `families`; tests compare the counts with those of transformers' models.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from math import gcd
from pathlib import Path

from apportion.catalog.config_fields import ConfigFields
from apportion.catalog.families import FAMILIES, Family, Presence
from apportion.types.errors import ModelError
from apportion.types.model import LayerSpec, ModelSpec

_FORMATS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    hidden_size: int
    q_heads: int
    kv_heads: int
    head_dim: int


def read_model_spec(path: Path) -> ModelSpec:
    """The model in a folder with a config.json, or of a config.json itself. Raises ModelError."""
    file = path if path.is_file() else path / "config.json"
    fields = ConfigFields.read(file)
    family_name = _family_name(fields)
    family = FAMILIES[family_name]
    fields = fields.over(family.defaults)
    attention = _read_attention(fields)
    num_layers = fields.positive("num_hidden_layers")
    is_moe = [_is_moe_layer(fields, family, layer) for layer in range(num_layers)]
    widths = [_ffn_width(fields, family, moe) for moe in is_moe]
    columns = gcd(*widths)
    windows = _layer_windows(fields, family, num_layers)
    spec = ModelSpec(
        name=file.resolve().parent.name,
        family=family_name,
        fingerprint="",
        layers=tuple(
            _layer(fields, family, attention, moe, width // columns, window)
            for moe, width, window in zip(is_moe, widths, windows, strict=True)
        ),
        hidden_size=attention.hidden_size,
        q_heads=attention.q_heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        ffn_columns=columns,
        vocab_rows=fields.positive("vocab_size"),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        max_context_tokens=_max_context(fields),
        checkpoint_format=_checkpoint_format(fields),
    )
    return replace(spec, fingerprint=_fingerprint(spec))


def _family_name(fields: ConfigFields) -> str:
    name = fields.get("model_type")
    if name is None:
        raise ModelError(f"{fields.file} lacks 'model_type'; name a transformers model's folder")
    if name not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise ModelError(
            f"{fields.file}: model_type {json.dumps(name)} is not supported; choose one of {supported}"
        )
    if fields.get("quantization_config") is not None:
        method = fields.mapping("quantization_config").get("quant_method", "unknown")
        raise ModelError(
            f"{fields.file}: the checkpoint is quantised ({method}); use its bf16, fp16 or fp32 version"
        )
    if fields.flag("use_bidirectional_attention"):
        raise ModelError(f"{fields.file}: 'use_bidirectional_attention' is true; use a causal language model")
    return str(name)


def _read_attention(fields: ConfigFields) -> _Attention:
    hidden_size, q_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    kv_heads = fields.optional_positive("num_key_value_heads") or q_heads
    head_dim = fields.optional_positive("head_dim")
    if q_heads % kv_heads:
        raise fields.invalid("num_key_value_heads", f"a divisor of num_attention_heads ({q_heads})")
    if head_dim is None and hidden_size % q_heads:
        raise fields.invalid(
            "hidden_size", f"a multiple of num_attention_heads ({q_heads}), or head_dim given"
        )
    return _Attention(
        hidden_size=hidden_size,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim or hidden_size // q_heads,
    )


def _is_moe_layer(fields: ConfigFields, family: Family, layer: int) -> bool:
    if not family.moe:
        return False
    if family.expert_width_field == "intermediate_size":
        return True
    dense_layers = fields.items("mlp_only_layers") or []
    return (
        _num_experts(fields) > 0
        and layer not in dense_layers
        and (layer + 1) % fields.positive("decoder_sparse_step") == 0
    )


def _num_experts(fields: ConfigFields) -> int:
    """transformers writes either name, whichever version saved the file."""
    return fields.count("num_local_experts" if fields.get("num_experts") is None else "num_experts")


def _ffn_width(fields: ConfigFields, family: Family, moe: bool) -> int:
    return fields.positive(family.expert_width_field if moe else "intermediate_size")


def _layer_windows(fields: ConfigFields, family: Family, num_layers: int) -> list[int | None]:
    window = fields.optional_positive("sliding_window")
    gated_off = "use_sliding_window" in family.defaults and not fields.flag("use_sliding_window")
    if family.windows == "none" or window is None or gated_off:
        return [None] * num_layers
    if family.windows == "all":
        return [window] * num_layers
    return [window if slides else None for slides in _sliding_layers(fields, family, num_layers)]


def _sliding_layers(fields: ConfigFields, family: Family, num_layers: int) -> list[bool]:
    types = fields.items("layer_types")
    if types is not None:
        if len(types) != num_layers or any(kind not in _LAYER_TYPES for kind in types):
            raise fields.invalid("layer_types", f"{num_layers} of {' or '.join(_LAYER_TYPES)}")
        return [kind == "sliding_attention" for kind in types]
    match family.windows:
        case "alternating":
            return [layer % 2 == 0 for layer in range(num_layers)]
        case "pattern":
            period = fields.positive("sliding_window_pattern")
            return [(layer + 1) % period != 0 for layer in range(num_layers)]
        case _:
            return [layer >= fields.count("max_window_layers") for layer in range(num_layers)]


def _layer(
    fields: ConfigFields,
    family: Family,
    attention: _Attention,
    moe: bool,
    width_per_column: int,
    window_tokens: int | None,
) -> LayerSpec:
    hidden_size = attention.hidden_size
    num_experts = _num_experts(fields) if moe else 0
    ffn_bias = family.expert_bias if moe else _present(fields, family.mlp_bias)
    ffn_copies = num_experts if moe else 1
    router_params = num_experts * (hidden_size + family.expert_bias)
    return LayerSpec(
        attention_params_per_kv_head=_params_per_kv_head(fields, family, attention),
        ffn_params_per_column=ffn_copies * (3 * hidden_size + 2 * ffn_bias) * width_per_column,
        replicated_params=family.norms * hidden_size
        + _present(fields, family.output_bias) * hidden_size
        + (2 * attention.head_dim if family.qk_norm == "head" else 0)
        + ffn_copies * ffn_bias * hidden_size
        + router_params,
        window_tokens=window_tokens,
        num_experts=num_experts,
        experts_per_token=fields.positive("num_experts_per_tok") if moe else 0,
    )


def _params_per_kv_head(fields: ConfigFields, family: Family, attention: _Attention) -> int:
    """Of one KV head: its keys' and values' projections, and its query heads' projections in and out."""
    q_heads = attention.q_heads // attention.kv_heads
    q_width, kv_width = q_heads * attention.head_dim, attention.head_dim
    inputs = attention.hidden_size + _present(fields, family.qkv_bias)
    wide_norms = q_width + kv_width if family.qk_norm == "wide" else 0
    sinks = q_heads if family.sinks else 0
    return (q_width + 2 * kv_width) * inputs + q_width * attention.hidden_size + wide_norms + sinks


def _present(fields: ConfigFields, presence: Presence) -> bool:
    return presence == "always" or (presence != "never" and fields.flag(presence))


def _max_context(fields: ConfigFields) -> int:
    """Longrope swaps its frequencies when *any* sequence of a batch outgrows the original length, and a result
    may not depend on who shares the batch: such a model serves contexts up to the original length."""
    max_tokens = fields.positive("max_position_embeddings")
    rope = fields.mapping("rope_parameters") or fields.mapping("rope_scaling")
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "longrope" and not (fields.get("model_type") == "phi3" and kind in ("su", "yarn")):
        return max_tokens
    original = fields.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return min(max_tokens, original) if isinstance(original, int) else max_tokens


def _checkpoint_format(fields: ConfigFields) -> str:
    name = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if name not in _FORMATS:
        field_name = "dtype" if fields.get("dtype") else "torch_dtype"
        raise fields.invalid(field_name, f"one of {', '.join(_FORMATS)}")
    return _FORMATS[str(name)]


def _fingerprint(spec: ModelSpec) -> str:
    content = {key: value for key, value in asdict(spec).items() if key not in ("name", "fingerprint")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
