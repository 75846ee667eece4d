"""What a config.json says of rotary position embeddings, without torch; `rope` makes frequencies of it.

It is read as transformers reads it, its old names (`rope_scaling`, `type`) too.
"""

import math
from dataclasses import dataclass

from apportion.model.config_values import ConfigValues, UnusualConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's: wavelengths beyond `original_tokens / low` are stretched, those below `original_tokens / high`
    kept."""

    low: float
    high: float
    original_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN's (arXiv 2309.00071): frequencies of fewer than `slow` turns in `original_tokens` are stretched, those of
    more than `fast` kept."""

    fast: float
    slow: float
    original_tokens: float
    truncate: bool
    """Whether what lies between begins and ends at whole dimensions."""
    amplitude: float
    """Of cos and sin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    theta: float
    factor: float = 1.0
    """By which positions are stretched."""
    scaling: Llama3Scaling | YarnScaling | None = None
    """None stretches all frequencies alike."""


def read_rope(config: ConfigValues, default_theta: float) -> RopeConfig:
    """Of all layers. Raises UnusualConfigError."""
    scaling = config.within("rope_scaling")
    rope = scaling if scaling.values else config.within("rope_parameters")
    return _read(config, rope, config.number("rope_theta", default_theta))


def read_two_ropes(
    config: ConfigValues, default_theta: float, default_sliding_theta: float
) -> tuple[RopeConfig, RopeConfig]:
    """Of full and of sliding layers. Raises UnusualConfigError."""
    ropes = config.within("rope_parameters")
    full = ConfigValues({**ropes.within("full_attention").values, **config.within("rope_scaling").values})
    sliding = ropes.within("sliding_attention")
    return (
        _read(config, full, config.number("rope_theta", default_theta)),
        _read(config, sliding, config.number("rope_local_base_freq", default_sliding_theta)),
    )


def _read(config: ConfigValues, rope: ConfigValues, default_theta: float) -> RopeConfig:
    if any(one.number("partial_rotary_factor", 1.0) != 1 for one in (config, rope)):
        raise UnusualConfigError("partial_rotary_factor")
    theta = rope.number("rope_theta", default_theta)
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = rope.required("factor")
    match kind:
        case "linear":
            return RopeConfig(theta=theta, factor=factor)
        case "llama3":
            return RopeConfig(theta=theta, factor=factor, scaling=_llama3(config, rope))
        case "yarn":
            return RopeConfig(theta=theta, factor=factor, scaling=_yarn(config, rope, factor))
        case _:
            raise UnusualConfigError("rope_type")


def _llama3(config: ConfigValues, rope: ConfigValues) -> Llama3Scaling:
    return Llama3Scaling(
        low=rope.required("low_freq_factor"),
        high=rope.required("high_freq_factor"),
        original_tokens=_original_tokens(config, rope),
    )


def _yarn(config: ConfigValues, rope: ConfigValues, factor: float) -> YarnScaling:
    amplitude = rope.number("attention_factor", None)
    return YarnScaling(
        fast=rope.number("beta_fast", 32.0),
        slow=rope.number("beta_slow", 1.0),
        original_tokens=_original_tokens(config, rope),
        truncate=rope.flag("truncate", default=True),
        amplitude=_yarn_amplitude(rope, factor) if amplitude is None else amplitude,
    )


def _yarn_amplitude(rope: ConfigValues, factor: float) -> float:
    mscale, mscale_all_dim = (rope.number(name, None) for name in ("mscale", "mscale_all_dim"))
    if mscale is None or mscale_all_dim is None:
        return _mscale(factor, 1.0)
    return _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _original_tokens(config: ConfigValues, rope: ConfigValues) -> float:
    name = "original_max_position_embeddings"
    said = config.number(name, None) or rope.number(name, None)
    return said or config.required("max_position_embeddings")
