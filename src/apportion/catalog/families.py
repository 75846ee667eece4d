"""The model families that can be divided, as data: what layers hold, and what a config.json may leave unsaid.

Defaults are those of the configuration classes in transformers 5.23 (`models/*/configuration_*.py`), layouts
those of `models/*/modeling_*.py`. A family is runnable only if its parity test passes (tests/parity); of the others
the parameter counts are tested, which is what planning needs.
"""

from dataclasses import dataclass, field
from typing import Literal

Presence = Literal["never", "always", "attention_bias", "mlp_bias"]
"""Whether a bias exists: never, always, or as the config field of that name says."""

Windows = Literal["none", "all", "alternating", "pattern", "upper"]
"""Which layers slide where `layer_types` is absent ("none" and "all" ignore `layer_types` altogether): every
other one from the first; all but each `sliding_window_pattern`-th; those from `max_window_layers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    defaults: dict[str, int | bool | None] = field(default_factory=dict[str, int | bool | None])
    """Config fields that may be absent."""
    qkv_bias: Presence = "never"
    output_bias: Presence = "never"
    """Bias of the attention's output projection."""
    mlp_bias: Presence = "never"
    expert_bias: bool = False
    """Biases on the router and on each expert's projections."""
    qk_norm: Literal["none", "head", "wide", "use_qk_norm"] = "none"
    """One norm weight per head dimension, shared by all heads, or one per dimension of every head; or the first
    where the config field of that name says so."""
    sinks: bool = False
    """One attention sink per query head."""
    norms: int = 2
    windows: Windows = "none"
    moe: bool = False
    expert_width_field: str = "intermediate_size"
    dense_first: bool = False
    """The first `first_k_dense_replace` layers are dense; the others have `n_shared_experts` for every token, and a
    correction bias for each expert routed to."""
    latent: bool = False
    """Multi-head latent attention."""
    runnable: bool = True


_LLAMA_BIASES: dict[str, int | bool | None] = {"attention_bias": False, "mlp_bias": False}
_QWEN_WINDOW: dict[str, int | bool | None] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_GEMMA: dict[str, int | bool | None] = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_ONE_SHARED_EXPERT: dict[str, int | bool | None] = {"n_shared_experts": 1, "first_k_dense_replace": 1}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults=_LLAMA_BIASES | {"max_position_embeddings": 2048},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        windows="all",
    ),
    "qwen2": Family(defaults=_QWEN_WINDOW, qkv_bias="always", windows="upper"),
    "qwen3": Family(
        defaults=_QWEN_WINDOW | {"head_dim": 128, "attention_bias": False},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
        windows="upper",
    ),
    "gemma2": Family(
        defaults=_GEMMA | {"max_position_embeddings": 8192},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        norms=4,
        windows="alternating",
    ),
    "gemma3_text": Family(
        defaults=_GEMMA | {"max_position_embeddings": 131072, "sliding_window_pattern": 6},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
        norms=4,
        windows="pattern",
    ),
    "mixtral": Family(
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        windows="all",
        moe=True,
    ),
    "qwen3_moe": Family(
        defaults={
            "num_key_value_heads": 4,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
            "moe_intermediate_size": 768,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
        windows="all",
        moe=True,
        expert_width_field="moe_intermediate_size",
    ),
    "phi3": Family(defaults={"max_position_embeddings": 4096}, windows="all"),
    "olmo2": Family(
        defaults={"attention_bias": False, "max_position_embeddings": 2048},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="wide",
    ),
    "granite": Family(
        defaults=_LLAMA_BIASES | {"max_position_embeddings": 2048},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "gpt_oss": Family(
        defaults={
            "head_dim": 64,
            "num_key_value_heads": 8,
            "attention_bias": True,
            "sliding_window": 128,
            "max_position_embeddings": 131072,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        expert_bias=True,
        sinks=True,
        windows="alternating",
        moe=True,
    ),
    "glm4": Family(
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "attention_bias": True,
            "max_position_embeddings": 131072,
        },
        qkv_bias="attention_bias",
        norms=4,
        runnable=False,
    ),
    "glm4_moe": Family(
        defaults={
            "num_key_value_heads": 8,
            "attention_bias": False,
            "use_qk_norm": False,
            "max_position_embeddings": 131072,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            **_ONE_SHARED_EXPERT,
        },
        qkv_bias="attention_bias",
        qk_norm="use_qk_norm",
        moe=True,
        expert_width_field="moe_intermediate_size",
        dense_first=True,
        runnable=False,
    ),
    "deepseek_v3": Family(
        defaults={
            "attention_bias": False,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            **_ONE_SHARED_EXPERT,
            "first_k_dense_replace": 3,
        },
        output_bias="attention_bias",
        moe=True,
        expert_width_field="moe_intermediate_size",
        dense_first=True,
        latent=True,
        runnable=False,
    ),
}
SAME_LAYOUT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "kimi_k2": "deepseek_v3",
    "mimo": "qwen2",
}
"""Other families whose layers hold the same; they are planned alone."""
RUNNABLE = frozenset(name for name, family in FAMILIES.items() if family.runnable)
"""Families that the engine runs; the others can only be planned."""
