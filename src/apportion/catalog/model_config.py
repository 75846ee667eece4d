"""A model's config.json as a ModelSpec: exact parameter counts per layer and axis, without torch.

The layouts are declared in `families`; tests compare the counts with those of transformers' models, and `checkpoint`
with the model's own files, where there are any.
"""

import hashlib
import json
from dataclasses import asdict, replace
from math import gcd
from pathlib import Path

from apportion.catalog.attention import Attention, present, read_attention
from apportion.catalog.checkpoint import with_checkpoint
from apportion.catalog.config_fields import ConfigFields
from apportion.catalog.described import Description, described_spec
from apportion.catalog.families import FAMILIES, SAME_LAYOUT, Family
from apportion.catalog.general import general_gguf, general_spec, with_named_parts
from apportion.catalog.gguf_config import GGUF_SUFFIX, check_gguf, gguf_fields, is_known, unknown_fields
from apportion.catalog.gguf_file import read_gguf
from apportion.catalog.gguf_stored import with_gguf_bytes
from apportion.catalog.known_models import CATALOGUE
from apportion.catalog.quantisation import Quantisation, read_quantisation
from apportion.catalog.quantised_config import with_formula
from apportion.catalog.safetensors_header import TensorHeader, read_headers
from apportion.catalog.wrapped_config import language_fields
from apportion.types.errors import ModelError
from apportion.types.model import LayerSpec, ModelSpec, Parameters

_FORMATS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_NOT_DESCRIBED = ("name", "fingerprint", "notes", "stored", "stored_bytes", "stored_block_bytes")
_SELDOM_DESCRIBED = ("cache", "beside_embedding")
"""Left out where a model has none, so that they change no other model's fingerprint."""
MAX_LAYERS, MAX_PARAMETERS = 1024, 10**14
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_model_spec(path: Path | Description) -> ModelSpec:
    """The model in a folder with a config.json, of a config.json itself or of a GGUF file, or described by hand. Raises
    ModelError, and UsageError for a description."""
    if isinstance(path, Description):
        return _identified(described_spec(path))
    if path.suffix == GGUF_SUFFIX and not path.is_dir():
        gguf = read_gguf(path)
        if not is_known(gguf):
            fields, architecture, float_format = unknown_fields(gguf)
            return _identified(general_gguf(gguf, fields, architecture, float_format))
        spec = model_spec(gguf_fields(gguf), path.stem)
        check_gguf(gguf, spec)
        return with_gguf_bytes(gguf, spec)
    file = path if path.is_file() else path / "config.json"
    whole = ConfigFields.read(file)
    fields = language_fields(whole)
    quantisation = read_quantisation(fields)
    tensors = read_headers(path) if path.is_dir() else None
    if not _as_a_known_family(whole, fields, tensors):
        family, float_format = _model_type(whole), _checkpoint_format(fields)
        spec = general_spec(whole, fields, _name(file), family, float_format, tensors, quantisation)
        return _identified(_saying_dtype(spec, fields))
    spec = model_spec(fields, _name(file))
    if fields is not whole:
        spec = _wrapped(spec, _model_type(whole))
    if tensors is not None:
        return with_checkpoint(path, spec, tensors, quantisation)
    spec = _saying_dtype(spec, fields)
    if quantisation is None:
        return spec
    by_name = _by_name(fields, quantisation)
    return with_named_parts(spec, fields, quantisation) if by_name else with_formula(spec, quantisation)


def _by_name(fields: ConfigFields, quantisation: Quantisation) -> bool:
    """Where modules of one part of a layer are quantised in several ways, or some are not."""
    family = FAMILIES[SAME_LAYOUT.get(_model_type(fields), _model_type(fields))]
    return bool(quantisation.others) or (family.dense_first and bool(quantisation.kept))


def _as_a_known_family(
    whole: ConfigFields, fields: ConfigFields, tensors: tuple[TensorHeader, ...] | None
) -> bool:
    """Whether its counts follow from the fields. Files of a model that also sees have other names."""
    name = _model_type(fields)
    return SAME_LAYOUT.get(name, name) in FAMILIES and (fields is whole or tensors is None)


def _wrapped(spec: ModelSpec, family: str) -> ModelSpec:
    note = "the language model alone is planned; what sees and hears beside it is left out"
    return _identified(replace(spec, family=family, notes=(*spec.notes, note)))


def _identified(spec: ModelSpec) -> ModelSpec:
    if spec.num_parameters > MAX_PARAMETERS:
        raise ModelError(f"{spec.name} is described with {spec.num_parameters} parameters; check its sizes")
    return replace(spec, fingerprint=_fingerprint(spec))


def _saying_dtype(spec: ModelSpec, fields: ConfigFields) -> ModelSpec:
    if fields.get("dtype") or fields.get("torch_dtype"):
        return spec
    return replace(
        spec, notes=(*spec.notes, "config.json names no dtype: weights are taken to be of 16 bits (bf16)")
    )


def _name(file: Path) -> str:
    """A folder's name; the catalogue's configs are named after their models."""
    name = file.stem if file.parent == CATALOGUE else file.resolve().parent.name
    return name.encode(errors="replace").decode()


def model_spec(fields: ConfigFields, name: str) -> ModelSpec:
    family_name = _family_name(fields)
    family = FAMILIES[SAME_LAYOUT.get(family_name, family_name)]
    fields = fields.over(family.defaults)
    attention = read_attention(fields, family)
    num_layers = fields.positive("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise fields.invalid("num_hidden_layers", f"at most {MAX_LAYERS}")
    is_moe = [_is_moe_layer(fields, family, layer) for layer in range(num_layers)]
    widths = [_ffn_width(fields, family, moe) for moe in is_moe]
    columns = gcd(*widths)
    windows = _layer_windows(fields, family, num_layers)
    spec = ModelSpec(
        name=name,
        family=family_name,
        fingerprint="",
        layers=tuple(
            _layer(fields, family, attention, moe, width // columns, window)
            for moe, width, window in zip(is_moe, widths, windows, strict=True)
        ),
        hidden_size=fields.positive("hidden_size"),
        q_heads=attention.q_heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        ffn_columns=columns,
        vocab_rows=fields.positive("vocab_size"),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        max_context_tokens=_max_context(fields),
        checkpoint_format=_checkpoint_format(fields),
        kv_lora_rank=attention.kv_lora_rank,
    )
    if spec.num_parameters > MAX_PARAMETERS:
        raise ModelError(f"{fields.file} describes {spec.num_parameters} parameters; check its sizes")
    return replace(spec, fingerprint=_fingerprint(spec))


def _family_name(fields: ConfigFields) -> str:
    name = _model_type(fields)
    if fields.flag("use_bidirectional_attention"):
        raise ModelError(f"{fields.file}: 'use_bidirectional_attention' is true; use a causal language model")
    return name


def _model_type(fields: ConfigFields) -> str:
    name = fields.text("model_type")
    if name is None:
        raise ModelError(f"{fields.file} lacks 'model_type'; name a transformers model's folder")
    if not name or not name.isprintable():
        raise fields.invalid("model_type", "a name")
    return name


def _is_moe_layer(fields: ConfigFields, family: Family, layer: int) -> bool:
    if not family.moe:
        return False
    if family.expert_width_field == "intermediate_size":
        return True
    if family.dense_first:
        return layer >= fields.count("first_k_dense_replace")
    dense_layers = fields.items("mlp_only_layers") or []
    return (
        _routed_experts(fields) > 0
        and layer not in dense_layers
        and (layer + 1) % fields.positive("decoder_sparse_step") == 0
    )


def _routed_experts(fields: ConfigFields) -> int:
    """transformers writes one name or another, by family and by the version that saved the file."""
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return fields.count(next((name for name in names if fields.get(name) is not None), names[-1]))


def _shared_experts(fields: ConfigFields) -> int:
    return 0 if fields.get("n_shared_experts") is None else fields.count("n_shared_experts")


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
    attention: Attention,
    moe: bool,
    width_per_column: int,
    window_tokens: int | None,
) -> LayerSpec:
    hidden_size = fields.positive("hidden_size")
    routed, shared = (_routed_experts(fields), _shared_experts(fields)) if moe else (0, 0)
    ffn_bias = family.expert_bias if moe else present(fields, family.mlp_bias)
    ffn_copies = routed + shared if moe else 1
    columns = ffn_copies * width_per_column
    router_params = routed * (hidden_size + (family.expert_bias or family.dense_first))
    return LayerSpec(
        per_kv_head=attention.per_kv_head,
        per_ffn_column=Parameters(
            elements=3 * hidden_size * columns, rows=2 * columns, others=2 * ffn_bias * columns
        ),
        replicated=Parameters(
            elements=attention.replicated.elements,
            rows=attention.replicated.rows + ffn_copies * hidden_size,
            others=attention.replicated.others
            + family.norms * hidden_size
            + ffn_copies * ffn_bias * hidden_size
            + router_params,
        ),
        window_tokens=window_tokens,
        num_experts=routed + shared,
        experts_per_token=fields.positive("num_experts_per_tok") + shared if moe else 0,
    )


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
    name = fields.text("dtype") or fields.text("torch_dtype") or "bfloat16"
    if name not in _FORMATS:
        field_name = "dtype" if fields.get("dtype") else "torch_dtype"
        raise fields.invalid(field_name, f"one of {', '.join(_FORMATS)}")
    return _FORMATS[name]


def _fingerprint(spec: ModelSpec) -> str:
    """Fields that a model does not use are left out, so that a new one changes no other model's fingerprint."""
    content = asdict(spec, dict_factory=_described)
    if spec.kv_lora_rank is None:
        del content["kv_lora_rank"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _described(items: list[tuple[str, object]]) -> dict[str, object]:
    """What a config says of a model, whatever its files hold it in."""
    return {
        key: value
        for key, value in items
        if key not in _NOT_DESCRIBED and (value or key not in _SELDOM_DESCRIBED)
    }
