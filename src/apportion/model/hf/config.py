"""The configs of a model's layers, as they are and shrunk to a member's share."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from apportion.model.weights.shard import Axis, RankShares
from apportion.types.errors import ModelError
from apportion.types.model import ModelSpec

ATTENTION = "apportion_paged"
"""The name under which transformers finds our attention."""
AXES: tuple[Axis, ...] = ("heads", "ffn")

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def read_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{folder / 'config.json'}: transformers refuses it ({reason}); correct it"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyConfigs:
    """A model's config as it is, shrunk to a member's share, and shrunk along one axis alone."""

    full: PreTrainedConfig
    local: PreTrainedConfig
    shrunk: dict[Axis, PreTrainedConfig]

    @classmethod
    def of(cls, config: PreTrainedConfig, model: ModelSpec, shares: RankShares) -> "FamilyConfigs":
        return cls(
            full=_shrunk_config(config, model, shares, ()),
            local=_shrunk_config(config, model, shares, AXES),
            shrunk={axis: _shrunk_config(config, model, shares, (axis,)) for axis in AXES},
        )


def _shrunk_config(
    config: PreTrainedConfig, model: ModelSpec, shares: RankShares, axes: tuple[Axis, ...]
) -> PreTrainedConfig:
    shrunk: Any = copy.deepcopy(config)
    shrunk.head_dim = model.head_dim  # some families derive it from the number of heads
    shrunk._attn_implementation = ATTENTION
    shrunk._experts_implementation = "eager"
    if "heads" in axes:
        shrunk.num_key_value_heads = shares.heads.count
        shrunk.num_attention_heads = shares.heads.count * model.q_heads_per_kv_head
    if "ffn" in axes:
        for field in ("intermediate_size", "moe_intermediate_size"):
            if getattr(config, field, None) is not None:
                setattr(shrunk, field, shares.ffn.scaled(getattr(config, field)))
    return shrunk


def skeleton_of(config: PreTrainedConfig) -> Any:
    """A model of one layer on the meta device, for the classes and the modules around the layers."""
    small: Any = copy.deepcopy(config)
    small.num_hidden_layers = 1
    small._attn_implementation = ATTENTION
    small.pad_token_id = None  # it marks a row of the embedding, which the member may not hold
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(small)
