"""What a lean layer needs of a config.json beside the ModelSpec, without torch.

Defaults are those of the configuration classes in transformers 5.23. A config that says anything unusual is left to
transformers' own layers, or to its refusal.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from apportion.model.config_values import ConfigValues, UnusualConfigError
from apportion.model.rope_config import RopeConfig, read_rope, read_two_ropes
from apportion.types.json_text import parse_json
from apportion.types.model import ModelSpec
from apportion.types.text_file import read_text

Activation = Literal["silu", "gelu_pytorch_tanh", "gelu"]
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What a config cannot say, and defaults for what it may leave unsaid."""

    gemma: bool = False
    head_norms: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 1e4
    sliding_rope_theta: float | None = None
    """Where sliding layers have rotary frequencies of their own."""
    attention_softcap: float | None = None
    """None where there is no field for it."""
    logits_softcap: float | None = None


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "qwen2": _Family(),
    "qwen3": _Family(head_norms=True),
    "gemma2": _Family(gemma=True, attention_softcap=50.0, logits_softcap=30.0),
    "gemma3_text": _Family(gemma=True, head_norms=True, rope_theta=1e6, sliding_rope_theta=1e4),
    "mixtral": _Family(norm_eps=1e-5, rope_theta=1e6),
    "qwen3_moe": _Family(head_norms=True),
}
LEAN_FAMILIES = frozenset(_FAMILIES)
_GEMMA_QUERY_SCALAR = 256.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanConfig:
    gemma: bool
    """Norms after each half as well as before it, and all multiply by 1 + weight."""
    norm_eps: float
    head_norms: bool
    """Of each query and key."""
    activation: Activation
    normalised_experts: bool
    """Whether the weights of a token's experts sum to 1."""
    output_bias: bool
    """Of attention's output projection, where query, key and value have biases."""
    attention_scale: float
    attention_softcap: float | None
    logits_softcap: float | None
    embedding_multiplier: float
    rope: RopeConfig
    sliding_rope: RopeConfig | None
    """Of layers with a window, where it differs."""


def lean_config(path: Path, model: ModelSpec) -> LeanConfig | None:
    """Of a config.json or the folder with it; None where it is left to transformers."""
    family = _FAMILIES.get(model.family)
    if family is None:
        return None
    file = path / "config.json" if path.is_dir() else path
    try:
        return _lean_config(ConfigValues(parse_json(read_text(file))), family, model)
    except UnusualConfigError:
        return None


def _lean_config(config: ConfigValues, family: _Family, model: ModelSpec) -> LeanConfig:
    query_scalar: float = model.head_dim
    if family.gemma:
        query_scalar = config.number("query_pre_attn_scalar", _GEMMA_QUERY_SCALAR)
    rope, sliding_rope = _ropes(config, family)
    return LeanConfig(
        gemma=family.gemma,
        norm_eps=config.number("rms_norm_eps", family.norm_eps),
        head_norms=family.head_norms,
        activation=_activation(config, family),
        normalised_experts=model.family == "mixtral" or config.flag("norm_topk_prob"),
        output_bias=model.family != "qwen2",
        attention_scale=query_scalar**-0.5,
        attention_softcap=family.attention_softcap
        and _softcap(config, "attn_logit_softcapping", family.attention_softcap),
        logits_softcap=_softcap(config, "final_logit_softcapping", family.logits_softcap)
        if family.gemma
        else None,
        embedding_multiplier=model.hidden_size**0.5 if family.gemma else 1.0,
        rope=rope,
        sliding_rope=sliding_rope,
    )


def _activation(config: ConfigValues, family: _Family) -> Activation:
    name = config.values.get("hidden_activation" if family.gemma else "hidden_act")
    if name is None:
        return "gelu_pytorch_tanh" if family.gemma else "silu"
    if name not in _ACTIVATIONS:
        raise UnusualConfigError(name)
    return cast(Activation, name)


def _softcap(config: ConfigValues, name: str, default: float | None) -> float | None:
    """Here null means none."""
    return config.number(name, None) if name in config.values else default


def _ropes(config: ConfigValues, family: _Family) -> tuple[RopeConfig, RopeConfig | None]:
    if family.sliding_rope_theta is None:
        return read_rope(config, family.rope_theta), None
    if config.values.get("sliding_window", True) is None:  # layers may be called sliding all the same
        raise UnusualConfigError("sliding_window")
    return read_two_ropes(config, family.rope_theta, family.sliding_rope_theta)
