"""A GGUF header read as the fields of a config.json, so that one derivation serves both.

Source: docs/gguf.md of ggml (keys of an architecture), gguf-py's constants (names of tensors).
"""

from collections import Counter
from collections.abc import Mapping

from apportion.catalog.config_fields import ConfigFields
from apportion.catalog.gguf_file import Gguf, Value
from apportion.catalog.gguf_stored import FLOAT_TYPES, block_number
from apportion.types.errors import ModelError
from apportion.types.model import ModelSpec

GGUF_SUFFIX = ".gguf"
_FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "gpt-oss": "gpt_oss",
    "glm4": "glm4",
    "glm4moe": "glm4_moe",
    "deepseek2": "deepseek_v3",
}
"""By architecture; "llama" with experts is mixtral."""
_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
}
_MORE_FIELDS = {
    "kv_lora_rank": "attention.kv_lora_rank",
    "sliding_window": "attention.sliding_window",
    "ssm_state_size": "ssm.state_size",
    "num_kv_shared_layers": "attention.shared_kv_layers",
}
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Computed from the config elsewhere, so no parameters."""
_LATENT = ("deepseek_v3",)
"""Families with multi-head latent attention."""
_EXPERT_WIDTH_ALONE = ("gpt_oss",)
"""Families whose config calls the experts' width `intermediate_size`."""


def is_known(gguf: Gguf) -> bool:
    return str(gguf.metadata.get("general.architecture")) in _FAMILIES


def unknown_fields(gguf: Gguf) -> tuple[ConfigFields, str, str]:
    """What the metadata say of any architecture, its name, and the format of what is not quantised. Raises
    ModelError."""
    architecture = gguf.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture.isprintable():
        raise ModelError(f"{gguf.path} names no architecture; it is not a language model's file")
    if gguf.metadata.get(f"{architecture}.attention.causal") is False:
        raise ModelError(f"{gguf.path}: '{architecture}' is an encoder, which cannot be planned")
    values = {
        name: gguf.metadata.get(f"{architecture}.{key}") for name, key in (_FIELDS | _MORE_FIELDS).items()
    }
    fields = {name: value for name, value in values.items() if value is not None}
    main = {"float32": "fp32", "bfloat16": "bf16"}.get(FLOAT_TYPES.get(_main_type(gguf), ""), "fp16")
    return ConfigFields(gguf.path, {**fields, "num_hidden_layers": _num_layers(gguf)}, {}), architecture, main


def gguf_fields(gguf: Gguf) -> ConfigFields:
    """Raises ModelError."""
    architecture = gguf.metadata.get("general.architecture")
    family = _FAMILIES.get(str(architecture))
    if family is None:
        raise ModelError(
            f"{gguf.path}: architecture {str(architecture)!r} is not supported; choose one of {', '.join(_FAMILIES)}"
        )
    values = {name: _scalar(gguf, f"{architecture}.{key}") for name, key in _FIELDS.items()}
    if family == "llama" and values["num_experts"]:
        family = "mixtral"
    if family in _EXPERT_WIDTH_ALONE:
        values["intermediate_size"] = values["moe_intermediate_size"] or values["intermediate_size"]
    return ConfigFields(
        gguf.path,
        {
            **{name: value for name, value in values.items() if value is not None},
            **(_latent_fields(gguf, str(architecture)) if family in _LATENT else {}),
            "num_hidden_layers": _num_layers(gguf),
            **_from_tensors(gguf),
            "model_type": family,
            "sliding_window": _scalar(gguf, f"{architecture}.attention.sliding_window") or None,
            "torch_dtype": FLOAT_TYPES.get(_main_type(gguf), "float16"),
        },
        {},
    )


def _num_layers(gguf: Gguf) -> Value:
    """Without the modules for multi-token prediction, which are stored as further blocks and not planned."""
    architecture = gguf.metadata.get("general.architecture")
    blocks = gguf.metadata.get(f"{architecture}.block_count")
    extra = gguf.metadata.get(f"{architecture}.nextn_predict_layers")
    return blocks - extra if isinstance(blocks, int) and isinstance(extra, int) else blocks


def _latent_fields(gguf: Gguf, architecture: str) -> Mapping[str, object]:
    """Older files give the lengths of keys and values as they are without the latent."""

    def value(key: str) -> Value:
        return _scalar(gguf, f"{architecture}.{key}")

    rope_dim = value("rope.dimension_count")
    key_dim = value("attention.key_length_mla") or value("attention.key_length")
    nope_dim = key_dim - rope_dim if isinstance(rope_dim, int) and isinstance(key_dim, int) else None
    return {
        "q_lora_rank": value("attention.q_lora_rank"),
        "kv_lora_rank": value("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": nope_dim,
        "v_head_dim": value("attention.value_length_mla") or value("attention.value_length"),
    }


def _scalar(gguf: Gguf, key: str) -> Value:
    """A value that some files give by layer; it must then be the same for all."""
    value = gguf.metadata.get(key)
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ModelError(f"{gguf.path}: '{key}' differs between layers, which is not supported")
    return value[0]


def _from_tensors(gguf: Gguf) -> Mapping[str, object]:
    """What a GGUF's metadata leaves to be seen from its tensors."""
    table = gguf.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelError(f"{gguf.path} has no token_embd.weight; it is not a language model's file")
    longrope = "rope_factors_long.weight" in gguf.tensors
    return {
        "vocab_size": table.shape[1],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in gguf.tensors,
        **({"rope_scaling": {"type": "longrope"}} if longrope else {}),
    }


def _main_type(gguf: Gguf) -> str:
    """The type that holds most of the parameters."""
    elements: Counter[str] = Counter()
    for tensor in gguf.tensors.values():
        elements[tensor.type_name] += tensor.num_elements
    return elements.most_common(1)[0][0] if elements else "f32"


def check_gguf(gguf: Gguf, spec: ModelSpec) -> None:
    """Raises ModelError where the tensors are not the parameters that the header describes."""
    held = sum(
        tensor.num_elements
        for name, tensor in gguf.tensors.items()
        if name not in _ROPE_TENSORS and block_number(name) < spec.num_layers
    )
    described = spec.num_parameters
    if held != described:
        raise ModelError(
            f"{gguf.path}: its tensors hold {held} parameters, but its header describes {described};"
            " the file is of a variant that is not supported, or not whole"
        )
