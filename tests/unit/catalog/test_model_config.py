import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity.tiny_models import FAMILIES, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from apportion.catalog.families import RUNNABLE
from apportion.catalog.model_config import read_model_spec
from apportion.types.errors import ModelError
from apportion.types.model import ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 311,
    "hidden_size": 128,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "pad_token_id": None,
}
"""All that no family has a default for."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"attention_bias": False, "mlp_bias": False}, {"tie_word_embeddings": True}],
    "mistral": [{"sliding_window": None}, {"head_dim": None}],
    "qwen2": [{"use_sliding_window": False}, {"layer_types": ["full_attention", "sliding_attention"] * 2}],
    "qwen3": [{"attention_bias": False}, {"use_sliding_window": True, "max_window_layers": 1}],
    "gemma2": [{"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}],
    "gemma3_text": [{"sliding_window_pattern": 2}],
    "mixtral": [{"sliding_window": 5}, {"head_dim": None}],
    "qwen3_moe": [{"mlp_only_layers": []}, {"decoder_sparse_step": 2, "use_sliding_window": True}],
    "phi3": [{"sliding_window": None}],
    "olmo2": [{"attention_bias": False}, {"num_key_value_heads": None}],
    "granite": [{"attention_bias": False}, {"tie_word_embeddings": False}],
    "gpt_oss": [{"attention_bias": False}],
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def whole_layer(spec: ModelSpec, layer: int) -> int:
    part = spec.layers[layer]
    return (
        spec.kv_heads * part.per_kv_head.count
        + spec.ffn_columns * part.per_ffn_column.count
        + part.replicated.count
    )


def check_against_transformers(folder: Path) -> ModelSpec:
    spec = read_model_spec(folder)
    config: Any = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        assert whole_layer(spec, index) == sum(p.numel() for p in layer.parameters())
        window = getattr(attention, "sliding_window", None)
        if spec.family in ("mistral", "mixtral", "phi3"):
            window = config.sliding_window
        assert spec.layers[index].window_tokens == window
        assert spec.layers[index].num_experts == getattr(
            getattr(layer.mlp, "experts", None), "num_experts", 0
        )
        assert attention.head_dim == spec.head_dim
        assert attention.num_key_value_groups == spec.q_heads_per_kv_head
    tables = 1 if spec.tied_embeddings else 2
    layers = sum(whole_layer(spec, index) for index in range(spec.num_layers))
    total = layers + tables * spec.embedding_params + spec.hidden_size
    assert total == sum(p.numel() for p in model.parameters())
    assert spec.max_context_tokens == config.max_position_embeddings
    return spec


def test_every_family_that_runs_is_tested():
    assert set(FAMILIES) == RUNNABLE


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_transformers(family: str, tmp_path: Path):
    for number, changes in enumerate([{}, *VARIANTS[family]]):
        folder = tmp_path / str(number)
        tiny_config(family, 4, **changes).save_pretrained(folder)
        spec = check_against_transformers(folder)
        assert spec.family == family
        assert spec.name == str(number)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_take_the_defaults_of_transformers(family: str, tmp_path: Path):
    sizes = SIZES | ({"num_key_value_heads": 32} if family == "granite" else {})
    check_against_transformers(write(tmp_path, {"model_type": family, **sizes}))


def test_layers_of_several_widths_share_a_unit(tmp_path: Path):
    tiny_config("qwen3_moe", 4).save_pretrained(tmp_path)
    spec = read_model_spec(tmp_path)
    assert spec.ffn_columns == 24  # gcd of 120 (dense) and 48 (an expert)
    assert [layer.num_experts for layer in spec.layers] == [6, 0, 6, 6]
    assert spec.layers[0].per_ffn_column.count == 6 * 3 * 64 * 2
    assert spec.layers[1].per_ffn_column.count == 3 * 64 * 5


def test_fingerprint_is_of_the_content(tmp_path: Path):
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    tiny_config("llama", 4).save_pretrained(first)
    tiny_config("llama", 4, transformers_version="1").save_pretrained(second)
    tiny_config("llama", 5).save_pretrained(other)
    spec = read_model_spec(first)
    assert len(spec.fingerprint) == 16
    assert read_model_spec(first / "config.json") == spec
    assert read_model_spec(second).fingerprint == spec.fingerprint
    assert read_model_spec(other).fingerprint != spec.fingerprint


@pytest.mark.parametrize(
    ("fields", "checkpoint_format"),
    [
        ({}, "bf16"),
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"dtype": "float16"}, "fp16"),
        ({"torch_dtype": None, "dtype": "float32"}, "fp32"),
    ],
)
def test_checkpoint_format(fields: dict[str, Any], checkpoint_format: str, tmp_path: Path):
    write(tmp_path, {"model_type": "llama", **SIZES, **fields})
    assert read_model_spec(tmp_path).checkpoint_format == checkpoint_format


def test_longrope_serves_its_original_length(tmp_path: Path):
    rope = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    phi3 = {
        "model_type": "phi3",
        **SIZES,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": rope,
    }
    assert read_model_spec(write(tmp_path, phi3)).max_context_tokens == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "a\nb"}, "'model_type' is \"a\\nb\"; it must be a name"),
        ({"model_type": None}, "lacks 'model_type'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0; it must be a positive whole number"),
        ({"num_hidden_layers": "4"}, "'num_hidden_layers' is \"4\""),
        (
            {"num_key_value_heads": 7},
            "'num_key_value_heads' is 7; it must be a divisor of num_attention_heads",
        ),
        ({"hidden_size": 100}, "'hidden_size' is 100; it must be a multiple of num_attention_heads"),
        ({"num_hidden_layers": 10**12}, "'num_hidden_layers' is 1000000000000; it must be at most 1024"),
        ({"vocab_size": 10**30}, "parameters; check its sizes"),
        ({"attention_bias": 1}, "'attention_bias' is 1; it must be true or false"),
        ({"torch_dtype": "int8"}, "'torch_dtype' is \"int8\"; it must be one of float32"),
        (
            {"quantization_config": {"quant_method": "aqlm"}},
            "quantised by the method 'aqlm', which cannot be planned",
        ),
        ({"quantization_config": {}}, "quantised by the method 'unknown'"),
        ({"quantization_config": "gptq"}, "'quantization_config' is \"gptq\"; it must be an object"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "lacks 'group_size'",
        ),
        ({"use_bidirectional_attention": True}, "use a causal language model"),
    ],
)
def test_unusable_configs_name_file_and_field(changes: dict[str, Any], message: str, tmp_path: Path):
    write(tmp_path, {"model_type": "llama", **SIZES, **changes})
    with pytest.raises(ModelError) as caught:
        read_model_spec(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("types", [["full_attention"], ["full_attention", "mamba"] * 2, "full_attention"])
def test_unusable_layer_types(types: Any, tmp_path: Path):
    write(tmp_path, {"model_type": "gemma2", **SIZES, "layer_types": types})
    with pytest.raises(ModelError, match="'layer_types' is"):
        read_model_spec(tmp_path)


def test_unreadable_files(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot be read"):
        read_model_spec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match="is not JSON"):
        read_model_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="is not a JSON object"):
        read_model_spec(tmp_path)


def test_transformers_is_the_version_the_families_were_read_from():
    assert transformers.__version__.startswith("5.23.")
