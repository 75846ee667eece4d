"""A lean layer's config against transformers' reading of the same config.json, and what is left to transformers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.tiny_models import tiny_config
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from apportion.catalog.model_config import read_model_spec
from apportion.model.lean.config import LEAN_FAMILIES, LeanConfig, lean_config
from apportion.model.rope import Rope
from apportion.model.rope_config import RopeConfig

POSITIONS_T = torch.tensor([0, 1, 7, 8, 100, 4095, 30000])
HEAD_DIM = 16
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "theta": {"rope_theta": 5e5},
    "theta, new name": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 5e5},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "llama3, new name": {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}},
    "yarn": {"rope_scaling": YARN, "rope_theta": 1e6},
    "yarn, original length outside": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "original_max_position_embeddings": 32,
    },
    "yarn, whole context": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn, all said": {
        "rope_scaling": YARN
        | {"mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 20, "beta_slow": 2, "truncate": False}
    },
    "yarn, amplitude": {"rope_scaling": YARN | {"attention_factor": 1.3}},
}
GEMMA3_ROPES: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "two thetas": {"rope_theta": 2e5, "rope_local_base_freq": 3e3},
    "scaled": {"rope_theta": 2e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "new names": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    },
    "full alone": {"rope_parameters": {"full_attention": YARN | {"rope_theta": 7e5}}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Configs:
    own: LeanConfig | None
    theirs: PreTrainedConfig


@pytest.fixture
def configs(tmp_path: Path):
    def read(family: str, said: dict[str, Any]) -> Configs:
        """Of a config.json that says this of what the tiny model's leaves unsaid."""
        unsaid = ("rope_parameters", "layer_types", "hidden_act", "hidden_activation", "rms_norm_eps")
        values = {
            name: value for name, value in tiny_config(family, 4).to_dict().items() if name not in unsaid
        }
        (tmp_path / "config.json").write_text(json.dumps(values | said))
        return Configs(
            own=lean_config(tmp_path, read_model_spec(tmp_path)), theirs=AutoConfig.from_pretrained(tmp_path)
        )

    return read


def rotation(config: RopeConfig) -> tuple[Tensor, Tensor]:
    return Rope(config, HEAD_DIM, torch.device("cpu"))(POSITIONS_T, torch.float32)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_rotary_embeddings(family: str, rope: str, configs):
    """To the bit: the same formulas in the same order."""
    both = configs(family, ROPES[rope])
    theirs = LlamaRotaryEmbedding(both.theirs)(torch.empty(0), POSITIONS_T[None])
    for own_1TD, their_1TD in zip(rotation(both.own.rope), theirs, strict=True):
        assert torch.equal(own_1TD, their_1TD)
    assert both.own.sliding_rope is None


@pytest.mark.parametrize("rope", GEMMA3_ROPES)
def test_rotary_embeddings_of_full_and_sliding_layers(rope: str, configs):
    both = configs("gemma3_text", GEMMA3_ROPES[rope])
    rotary = Gemma3RotaryEmbedding(both.theirs)
    kinds = {"full_attention": both.own.rope, "sliding_attention": both.own.sliding_rope}
    for kind, config in kinds.items():
        theirs = rotary(torch.empty(0), POSITIONS_T[None], kind)
        for own_1TD, their_1TD in zip(rotation(config), theirs, strict=True):
            assert torch.equal(own_1TD, their_1TD)


@pytest.mark.parametrize("family", sorted(LEAN_FAMILIES))
@pytest.mark.parametrize(
    "said",
    [
        {},
        {
            "rms_norm_eps": 3e-5,
            "hidden_act": "gelu",
            "hidden_activation": "gelu",
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 7.0,
            "final_logit_softcapping": 9.0,
            "norm_topk_prob": True,
        },
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "norm_topk_prob": False},
    ],
    ids=["nothing said", "all said", "null"],
)
def test_other_fields(family: str, said: dict[str, Any], configs):
    both = configs(family, said)
    own, theirs = both.own, both.theirs
    gemma = family.startswith("gemma")
    assert own.norm_eps == theirs.rms_norm_eps
    assert own.activation == (theirs.hidden_activation if gemma else theirs.hidden_act)
    assert own.attention_scale == (theirs.query_pre_attn_scalar if gemma else HEAD_DIM) ** -0.5
    assert own.attention_softcap == (theirs.attn_logit_softcapping if family == "gemma2" else None)
    assert own.logits_softcap == (theirs.final_logit_softcapping if gemma else None)
    assert own.embedding_multiplier == (theirs.hidden_size**0.5 if gemma else 1)
    assert own.normalised_experts == (family == "mixtral" or getattr(theirs, "norm_topk_prob", False))


@pytest.mark.parametrize(
    "said",
    [
        {"hidden_act": "relu"},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"partial_rotary_factor": 0.5},
        {"rms_norm_eps": 0},
        {"rope_theta": "10000"},
    ],
)
def test_the_unusual_is_left_to_transformers(said: dict[str, Any], tmp_path: Path):
    values = tiny_config("llama", 4).to_dict()
    del values["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(values | said))
    model = read_model_spec(tmp_path)
    assert lean_config(tmp_path, model) is None


def test_gemma3_without_a_window_is_left_to_transformers(configs):
    """Its layers are called sliding all the same, and have that rotary embedding."""
    assert configs("gemma3_text", {"sliding_window": None}).own is None


@pytest.mark.parametrize("family", ["phi3", "granite", "gpt_oss", "olmo2"])
def test_other_families_are_left_to_transformers(family: str, configs):
    assert configs(family, {}).own is None
