"""Families that can only be planned: their counts equal transformers', and latent attention is costed by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from planned import cluster, cpu, workload
from transformers import AutoModelForCausalLM

from apportion.catalog.families import FAMILIES, RUNNABLE
from apportion.catalog.known_models import known_config
from apportion.catalog.model_config import read_model_spec
from apportion.cost.formats import Formats
from apportion.cost.memory import kv_bytes_per_token
from apportion.cost.roofline import Step, attention_s
from apportion.cost.shard import stage_shards
from apportion.cost.statements import model_parameters
from apportion.planner.build import make_plan
from apportion.planner.verify.plan import verify
from apportion.types.model import ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 509,
    "hidden_size": 64,
    "intermediate_size": 120,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
LATENT = {
    "num_key_value_heads": 8,
    "moe_intermediate_size": 48,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
MOE = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("glm4", "Glm4Config", {"num_key_value_heads": 2, "head_dim": 16}),
    ("glm4", "Glm4Config", {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": False}),
    ("glm4_moe", "Glm4MoeConfig", MOE),
    ("glm4_moe", "Glm4MoeConfig", MOE | {"use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2}),
    ("deepseek_v3", "DeepseekV3Config", LATENT),
    ("deepseek_v3", "DeepseekV3Config", LATENT | {"q_lora_rank": None, "attention_bias": True}),
]


def saved(folder: Path, config_class: str, fields: dict[str, Any]) -> ModelSpec:
    config = getattr(transformers, config_class)(**(SIZES | fields))
    config.save_pretrained(folder)
    return read_model_spec(folder)


def test_every_family_that_is_only_planned_is_tested():
    assert {family for family, _, _ in CASES} == FAMILIES.keys() - RUNNABLE


@pytest.mark.parametrize(("family", "config_class", "fields"), CASES)
def test_counts_equal_transformers(family: str, config_class: str, fields: dict[str, Any], tmp_path: Path):
    spec = saved(tmp_path, config_class, fields)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**(SIZES | fields)))
    buffers = sum(
        buffer.numel() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")
    )
    assert model_parameters(spec) == sum(p.numel() for p in model.parameters()) + buffers
    assert spec.family == family
    for layer, module in zip(spec.layers, model.model.layers, strict=True):
        held = (
            spec.kv_heads * layer.per_kv_head.count
            + spec.ffn_columns * layer.per_ffn_column.count
            + layer.replicated.count
        )
        bias = sum(b.numel() for n, b in module.named_buffers() if n.endswith("e_score_correction_bias"))
        assert held == sum(p.numel() for p in module.parameters()) + bias


def test_shared_experts_are_experts_that_every_token_takes(tmp_path: Path):
    spec = saved(tmp_path, "DeepseekV3Config", LATENT)
    assert [(layer.num_experts, layer.experts_per_token) for layer in spec.layers] == [
        (0, 0),
        (8, 4),
        (8, 4),
        (8, 4),
    ]
    assert spec.ffn_columns == 24  # gcd of 120 (dense) and 48 (an expert)


FP32 = Formats(weights="fp32", activations="fp32", kv="fp32")


def test_latent_attention_by_hand(tmp_path: Path):
    spec = saved(tmp_path, "DeepseekV3Config", LATENT)
    assert (spec.kv_heads, spec.head_dim, spec.kv_lora_rank) == (8, 24, 20)
    layer = spec.layers[0]
    assert spec.kv_elements(layer, 8) == spec.kv_elements(layer, 1) == 24
    # q_b 24·16, kv_b 20·(12 + 10) and o 10·64 of a head; q_a 64·24 + 24, kv_a 64·24 + 20 and two norms of 64.
    assert layer.per_kv_head.count == 24 * 16 + 20 * 22 + 640
    assert layer.replicated.count == 64 * 24 + 24 + 64 * 24 + 20 + 128
    step = Step(sequences=1, new_tokens=1, start_tokens=99, sampled_rows=1)
    compute = replace(cpu("a", 1), mem_bytes_per_s=1e30, flops_per_s={"fp32": 1.0})
    memory = replace(cpu("a", 1), mem_bytes_per_s=1.0, flops_per_s={"fp32": 1e30})
    assert attention_s(compute, spec, layer, 2, step, FP32) == 2 * (2 * 1464 + 2 * 44 * 100) + 2 * 3244
    assert attention_s(memory, spec, layer, 2, step, FP32) == 4 * (2 * 1464 + 24 * 100 + 3244)


def test_each_member_of_a_group_holds_the_whole_latent(tmp_path: Path):
    spec = saved(tmp_path, "DeepseekV3Config", LATENT)
    plan = make_plan(spec, cluster([cpu("a", 1), cpu("b", 1)]), workload(context=640), ("fp32",))
    assert all(check.ok for check in verify(plan))
    for stage in plan.stages:
        for shard in stage_shards(spec, stage):
            assert kv_bytes_per_token(spec, shard) == stage.num_layers * 24 * 4


def test_deepseek_v3_caches_70_kb_a_token():
    """arXiv 2412.19437 and others: 61 layers × 576 elements × 2 bytes = 70 272 bytes."""
    spec = read_model_spec(known_config("deepseek-v3"))
    assert spec.num_layers * spec.kv_elements(spec.layers[0], spec.kv_heads) * 2 == 70_272
    active = sum(
        spec.kv_heads * layer.per_kv_head.count
        + layer.replicated.count
        + spec.ffn_columns
        * layer.per_ffn_column.count
        * (layer.experts_per_token / layer.num_experts if layer.num_experts else 1)
        for layer in spec.layers
    )
    assert active + 2 * spec.embedding_params == pytest.approx(37.5e9, rel=0.01)  # "37B activated"
