"""Quantisations by name reproduce published file sizes; methods in configs take their formulas' bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from apportion.asked.weights import with_asked_weights
from apportion.catalog.known_models import known_config
from apportion.catalog.model_config import read_model_spec
from apportion.catalog.named_weights import NAMED_WEIGHTS, named_weights, with_named_weights
from apportion.catalog.runnable import check_runnable
from apportion.cli.main import exit_code
from apportion.cost.formats import stored_bytes, weight_formats
from apportion.planner.plan_file import read_plan
from apportion.types.errors import ModelError, UsageError
from apportion.types.model import ModelSpec

GIB = 2**30
LLAMA_8B = {
    "IQ1_S": 1.87, "IQ1_M": 2.01, "IQ2_XXS": 2.23, "IQ2_XS": 2.42, "IQ2_S": 2.56, "IQ2_M": 2.74, "IQ3_XXS": 3.04,
    "IQ3_XS": 3.27, "IQ3_S": 3.42, "IQ3_M": 3.52, "IQ4_XS": 4.17, "IQ4_NL": 4.38, "Q2_K_S": 2.78, "Q2_K": 2.95,
    "Q3_K_S": 3.41, "Q3_K_L": 4.02, "Q4_K_S": 4.36, "Q4_K_M": 4.58, "Q5_K_S": 5.21, "Q5_K_M": 5.33, "Q6_K": 6.14,
    "Q8_0": 7.95,
}  # fmt: skip
"""GiB of Llama-3.1-8B by kind, from llama.cpp's tools/quantize/README.md."""


def known(name: str) -> ModelSpec:
    return read_model_spec(known_config(name))


@pytest.mark.parametrize("kind", LLAMA_8B)
def test_published_gguf_sizes(kind: str):
    name = named_weights(kind)
    assert name is not None
    size = stored_bytes(with_named_weights(known("llama-3.1-8b"), name))
    assert size / GIB == pytest.approx(LLAMA_8B[kind], rel=0.003)


@pytest.mark.parametrize(
    ("model", "name", "size_gib"),
    [
        # 70.55 B parameters: 4.82 bits each; the README's file of 43.1 GB (with its old rules) is 1.4 % more.
        ("llama-3.3-70b", "q4_k_m", 39.6),
        ("llama-3.3-70b", "q4_0", 37.2),
        # 4 bits and 20 for 128 elements in layers of 68.45 B; two tables of 1.05 B in 16 bits.
        ("llama-3.3-70b", "awq", (68.45e9 * (4 + 20 / 128) / 8 + 2.1e9 * 2) / GIB),
        # 4.5 bits everywhere.
        ("qwen3-32b", "mlx-4bit", 32.76e9 * 4.5 / 8 / GIB),
        ("llama-3.3-70b", "nvfp4", (68.45e9 * 4.5 / 8 + 2.1e9 * 2) / GIB),
        ("llama-3.3-70b", "fp8", (68.45e9 + 2.1e9 * 2) / GIB),
    ],
)
def test_sizes_by_name(model: str, name: str, size_gib: float):
    spelt = named_weights(name)
    assert spelt is not None
    assert stored_bytes(with_named_weights(known(model), spelt)) / GIB == pytest.approx(size_gib, rel=0.003)


@pytest.mark.parametrize("name", NAMED_WEIGHTS)
@pytest.mark.parametrize("model", ["gpt-oss-20b", "gemma-3-4b", "deepseek-v3", "qwen3-30b-a3b"])
def test_every_name_goes_with_every_kind_of_model(model: str, name: str):
    spec = known(model)
    named = with_asked_weights(spec, name)
    assert named.stored is not None
    assert named.stored.format == name
    assert named.fingerprint == spec.fingerprint
    bits = weight_formats(named)[name]
    assert 1.5 < bits < 13
    assert stored_bytes(named) < 2 * spec.num_parameters


def test_names_in_other_spellings():
    spellings = {
        "Q4_K_M": "q4_k_m",
        "q4-k-m": "q4_k_m",
        "AWQ": "awq-int4",
        "mlx_4bit": "mlx-4bit",
        "nf4": "bnb-nf4",
    }
    assert {
        one: named_weights(one) for one in (*spellings, "EXL3-3.5bpw", "q4", "exl3-40bpw")
    } == spellings | {
        "EXL3-3.5bpw": "exl3-3.5bpw",
        "q4": None,
        "exl3-40bpw": None,
    }


def test_two_formats_of_files_are_refused():
    with pytest.raises(UsageError, match="q4_k_m and q8_0 are two formats of files"):
        with_asked_weights(known("qwen3-8b"), "q4_k_m,q8_0")


def test_a_plan_by_name(tmp_path: Path):
    out = tmp_path / "plan.json"
    words = ["plan", "qwen3-8b", "--weights", "Q4_K_M", "--devices", "rtx-3060-12gb", "--out", str(out)]
    assert exit_code([*words, "--no-calibration"]) == 0
    plan = read_plan(out)
    assert plan.weight_formats_in_use == ("q4_k_m",)
    with pytest.raises(
        UsageError, match="q4_k_m weights can be planned and exported to other engines, but not run"
    ):
        check_runnable(plan)
    assert exit_code(["plan", "qwen3-8b", "--weights", "q4_k_z", "--devices", "rtx-3090"]) == 2


SIZES: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 4096,
    "vocab_size": 1000,
    "dtype": "bfloat16",
}
MATRICES = 4 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
TABLE, NORMS = 1000 * 1024, 2 * (4 * 2 + 1) * 1024
ROWS = 4 * (4 * 1024 + 2 * 4096 + 1024)
UINT4 = {"weight": {"dtype": "uint4", "qscheme": "per_group", "group_size": 32, "symmetric": False}}
FP8 = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}
FP4 = {"weight": [{"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}]}
TORCHAO = {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}}
HQQ = {"weight_quant_params": {"nbits": 4, "group_size": 64}}
Config = dict[str, Any]


@pytest.mark.parametrize(
    ("config", "name", "bits", "table_bits"),
    [
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "auto-round-int4", 4 + 20 / 128, 16),
        (
            {"quant_method": "intel/auto-round", "bits": 2, "group_size": 32},
            "auto-round-int2",
            2 + 18 / 32,
            16,
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "nvfp4", 4.5, 16),
        ({"quant_algo": "FP8"}, "fp8", 8, 16),
        ({"quant_method": "quark", "global_quant_config": UINT4}, "quark-int4", 4 + 20 / 32, 16),
        ({"quant_method": "quark", "global_quant_config": FP8}, "quark-fp8", 8, 16),
        ({"quant_method": "quark", "global_quant_config": FP4}, "quark-fp4", 4.25, 16),
        ({"quant_method": "torchao", "quant_type": TORCHAO}, "torchao-int4", 4.5, 16),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao-int8", 8, 16),
        ({"quant_method": "hqq", "quant_config": HQQ}, "hqq-int4", 4.5, 16),
        ({"group_size": 64, "bits": 4, "mode": "affine"}, "mlx-4bit", 4.5, 4.5),
        ({"group_size": 32, "bits": 8}, "mlx-8bit", 9, 9),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mlx-mxfp4", 4.25, 4.25),
        ({"group_size": 64, "bits": 4, "lm_head": False}, "mlx-4bit", 4.5, None),
    ],
)
def test_methods_in_configs(config: Config, name: str, bits: float, table_bits: float | None, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"quantization_config": config}))
    spec = read_model_spec(tmp_path)
    assert spec.stored is not None
    assert spec.stored.format == name
    tables = 2 * TABLE * table_bits / 8 if table_bits else TABLE * (2 + 4.5 / 8)
    beside = stored_bytes(spec) - (MATRICES * bits / 8 + tables + NORMS)
    assert 0 <= beside <= 4 * ROWS
    assert beside == 0 or bits == 8


def test_model_optimizer_s_own_file(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    quantised = {
        "quant_algo": "NVFP4",
        "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.*.self_attn*"],
    }
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantised}))
    held = stored_bytes(read_model_spec(tmp_path))
    attention = 4 * 4 * 1024 * 1024
    assert held == 2 * attention + (MATRICES - attention) * 4.5 / 8 + 4 * TABLE + NORMS


def test_a_folder_of_mlx(tmp_path: Path):
    """Four bits packed in 32, a 16-bit scale and bias for 64 elements, tables too: what its files hold is planned."""
    config = {"quantization": {"group_size": 64, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(SIZES | config))
    square, wide, tall = (1024, 1024), (4096, 1024), (1024, 4096)
    layer = dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), square)
    layer |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": tall}
    shapes = {f"model.layers.{n}.{name}": shape for n in range(4) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens": (1000, 1024), "lm_head": (1000, 1024)}
    tensors: dict[str, Any] = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{name}.weight"] = np.zeros((rows, columns // 8), dtype=np.uint32)
        for beside in ("scales", "biases"):
            tensors[f"{name}.{beside}"] = np.zeros((rows, columns // 64), dtype=np.float16)
    norms = [f"model.layers.{n}.{name}_layernorm" for n in range(4) for name in ("input", "post_attention")]
    tensors |= {f"{name}.weight": np.zeros(1024, dtype=np.float16) for name in (*norms, "model.norm")}
    save_file(tensors, tmp_path / "model.safetensors")
    spec = read_model_spec(tmp_path)
    assert spec.stored is not None
    assert spec.stored.format == "mlx-4bit"
    assert stored_bytes(spec) == sum(one.nbytes for one in tensors.values())
    assert stored_bytes(spec) == stored_bytes(read_model_spec(tmp_path / "config.json"))


def test_what_if_the_weights_were_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "plan.json")
    assert exit_code(["plan", "qwen3-8b", "--devices", "rtx-3090", "--out", out, "--no-calibration"]) == 0
    capsys.readouterr()
    assert exit_code(["whatif", out, "--weights", "q4_k_m"]) == 0
    assert "q4_k_m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_algo": "W3"}, "'quant_algo' is \"W3\"; it must be one of NVFP4"),
        ({"quant_method": "torchao", "quant_type": "sparse"}, "'quant_type' is \"sparse\""),
        ({"quant_method": "quark"}, "'global_quant_config' is null"),
        ({"quant_method": "hqq"}, "lacks 'nbits'"),
        ({"group_size": 64, "bits": 4, "mode": "new"}, "'mode' is \"new\""),
        ({"quant_method": "auto-round", "bits": [4]}, "'bits' is [4]"),
        ({"quant_method": ["awq"]}, "cannot be planned"),
    ],
)
def test_methods_that_cannot_be_read(config: Config, message: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"quantization_config": config}))
    with pytest.raises(ModelError) as caught:
        read_model_spec(tmp_path)
    assert message in str(caught.value)
