"""What of a config.json cannot be seen from a model's tensors, in any of the names that families use."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from apportion.catalog.config_fields import ConfigFields
from apportion.types.errors import ModelError

MAX_LAYERS = 1024
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "num_selected_experts",
    "moe_k",
)
_STATE_WIDTHS = ("ssm_state_size", "mamba_d_state", "state_size", "linear_key_head_dim", "head_size")
_WINDOWED = ("sliding_attention", "chunked_attention", "local_attention", "window_attention")
_STATEFUL = ("linear", "mamba", "recurrent", "conv", "rwkv", "ssm")
DEFAULT_CONTEXT = 2048
DEFAULT_STATE_WIDTH = 128
DEFAULT_EXPERTS_PER_TOKEN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    num_layers: int
    heads: int
    experts_per_token: int
    windows: tuple[int | None, ...]
    """Of each layer."""
    stateful: tuple[bool, ...]
    """Layers that the config says keep a state."""
    compression: tuple[int, ...]
    """Of each layer's cache: tokens that one of its entries stands for."""
    recent_tokens: int
    """Those that a compressed cache also holds one by one."""
    keys_expected: tuple[bool, ...]
    """Layers that the config says read a context, beside or instead of a state."""
    first_sharing: int
    """Layers from this one on read another layer's cache."""
    state_width: int
    latent_rank: int | None
    max_context_tokens: int
    assumed: tuple[str, ...]


def read_facts(fields: ConfigFields) -> Facts:
    """Raises ModelError."""
    if fields.get("is_encoder_decoder") is True:
        raise ModelError(
            f"{fields.file}: an encoder with a decoder cannot be planned; use a decoder-only model"
        )
    num_layers = _first(fields, _LAYERS)
    if num_layers is None:
        raise ModelError(f"{fields.file} lacks 'num_hidden_layers'")
    if num_layers > MAX_LAYERS:
        raise fields.invalid("num_hidden_layers", f"at most {MAX_LAYERS}")
    assumed: list[str] = []

    def known(names: Sequence[str], default: int, what: str) -> int:
        value = _first(fields, names)
        if value is None:
            assumed.append(f"{what} {default}")
        return value or default

    kinds = _layer_kinds(fields, num_layers)
    experts = any(
        isinstance(fields.get(name), int) for name in ("num_experts", "n_routed_experts", "num_local_experts")
    )
    stateful = tuple(kind is not None and kind.startswith(_STATEFUL) for kind in kinds)
    sharing = fields.get("num_kv_shared_layers")
    return Facts(
        num_layers=num_layers,
        heads=_first(fields, _HEADS) or 1,
        experts_per_token=known(_EXPERTS_PER_TOKEN, DEFAULT_EXPERTS_PER_TOKEN, "experts per token")
        if experts
        else _first(fields, _EXPERTS_PER_TOKEN) or DEFAULT_EXPERTS_PER_TOKEN,
        windows=_windows(fields, kinds),
        stateful=stateful,
        compression=_compression(fields, kinds),
        recent_tokens=_window(fields) or 0,
        keys_expected=tuple(kind is not None and "hybrid" in kind for kind in kinds),
        first_sharing=num_layers - sharing if isinstance(sharing, int) and sharing > 0 else num_layers,
        state_width=_first(fields, _STATE_WIDTHS) or DEFAULT_STATE_WIDTH,
        latent_rank=fields.optional_positive("kv_lora_rank"),
        max_context_tokens=known(_CONTEXT, DEFAULT_CONTEXT, "contexts of up to"),
        assumed=tuple(assumed),
    )


def _first(fields: ConfigFields, names: Sequence[str]) -> int | None:
    """Of a value by layer the largest."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, list) and value:
            value = max((one for one in cast(list[object], value) if isinstance(one, int)), default=None)
            if value is not None:
                return value
        if fields.get(name) is not None:
            return fields.optional_positive(name)
    return None


def _layer_kinds(fields: ConfigFields, num_layers: int) -> list[str | None]:
    kinds = fields.get("layer_types") or fields.get("layers_block_type")
    if isinstance(kinds, list) and len(cast(list[object], kinds)) >= num_layers:
        return [str(kind) for kind in cast(list[object], kinds)[:num_layers]]
    return [None] * num_layers


def _compression(fields: ConfigFields, kinds: Sequence[str | None]) -> tuple[int, ...]:
    rates = fields.get("compress_rates")
    known = cast(dict[str, object], rates) if isinstance(rates, dict) else {}
    values = [known.get(kind or "", 1) for kind in kinds]
    return tuple(value if isinstance(value, int) and value > 0 else 1 for value in values)


def _windows(fields: ConfigFields, kinds: Sequence[str | None]) -> tuple[int | None, ...]:
    """Where a config does not say which layers slide, none does: no less cache is planned than there may be."""
    window, chunk = _window(fields), _positive(fields.get("attention_chunk_size"))
    return tuple(
        None if kind not in _WINDOWED else (chunk or window if kind == "chunked_attention" else window)
        for kind in kinds
    )


def _window(fields: ConfigFields) -> int | None:
    """Where a family has none it may be written as 0."""
    names = ("sliding_window", "sliding_window_size", "attention_chunk_size")
    return next((size for name in names if (size := _positive(fields.get(name)))), None)


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
