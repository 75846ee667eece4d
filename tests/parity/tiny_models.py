"""Tiny random checkpoints of every family, with what trips a split: random norms and biases, sliding windows
shorter than the prompts, tied tables, several files, dense layers among MoE ones."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

WINDOW_TOKENS = 8
_SHARD_BYTES = 200_000
_COMMON = {
    "vocab_size": 509,  # a prime: shares are never even
    "hidden_size": 64,
    "intermediate_size": 120,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW_TOKENS},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW_TOKENS,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": {"attention_bias": True, "tie_word_embeddings": True},
    "gemma2": {"sliding_window": WINDOW_TOKENS, "query_pre_attn_scalar": 24},
    "gemma3_text": {
        "sliding_window": WINDOW_TOKENS,
        "query_pre_attn_scalar": 24,
        "sliding_window_pattern": 3,
        "attention_bias": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "moe_intermediate_size": 48,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "phi3": {"sliding_window": WINDOW_TOKENS},
    "olmo2": {"attention_bias": True},
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW_TOKENS},
}
FAMILIES = tuple(_CONFIGS)
_IN_SEVERAL_FILES = ("llama", "mixtral", "gpt_oss", "gemma2")
_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "granite": "Granite",
    "gpt_oss": "GptOss",
}


def tiny_config(family: str, num_layers: int, **changes: Any) -> transformers.PreTrainedConfig:
    config_class = getattr(transformers, f"{_CLASSES[family]}Config")
    return config_class(**(_COMMON | {"num_hidden_layers": num_layers} | _CONFIGS[family] | changes))


def make_checkpoint(
    family: str, folder: Path, num_layers: int = 4, dtype: torch.dtype = torch.float32
) -> None:
    """Writes config and safetensors, the same for the same arguments."""
    generator = torch.Generator().manual_seed(FAMILIES.index(family))
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family))
        model = AutoModelForCausalLM.from_config(tiny_config(family, num_layers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("_bias"):
                centre = 1 if "norm" in name and "gemma" not in family else 0
                parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    several = family in _IN_SEVERAL_FILES
    model.to(dtype).save_pretrained(folder, max_shard_size=_SHARD_BYTES if several else "1GB")
