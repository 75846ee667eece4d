"""A model described by hand: `layers=64 hidden=5120 heads=40 kv_heads=8 ffn=27648 vocab=152064`.

With experts: `experts=128 experts_per_token=8 expert_ffn=1536 shared_experts=1 dense_layers=3`. Instead of a width, the
size: `params=235B`, and of a model with experts `active=22B` too, from which the widths follow.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from apportion.catalog.config_fields import ConfigFields
from apportion.catalog.general import by_fields
from apportion.types.errors import UsageError
from apportion.types.model import ModelSpec
from apportion.types.names import unknown_name

_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn": "moe_intermediate_size",
    "shared_experts": "n_shared_experts",
    "dense_layers": "first_k_dense_replace",
    "latent": "kv_lora_rank",
}
_SIZES = ("params", "active")
_NEEDED = ("layers", "hidden", "heads", "vocab")
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_PAIR = re.compile(r"([a-z_]+)=(\d+(?:\.\d+)?)([kmbt]?)", re.IGNORECASE)
_DESCRIPTION = re.compile(r"\s*[a-z_]+=\S+(?:[\s,]+[a-z_]+=\S+)*\s*", re.IGNORECASE)
_LATENT = {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
"""As in DeepSeek-V3; a description gives the rank alone."""
DEFAULT_CONTEXT = 131072
SIZE_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    text: str


def described(name: str) -> Description | None:
    """None for what is no description but a name."""
    return Description(text=name) if _DESCRIPTION.fullmatch(name) else None


def described_spec(description: Description) -> ModelSpec:
    """Raises UsageError."""
    given = _pairs(description.text)
    missing = [name for name in _NEEDED if name not in given]
    if missing:
        raise UsageError(
            f"the description lacks {', '.join(missing)}; write at least"
            f" {' '.join(f'{name}=…' for name in _NEEDED)} and ffn=… or params=…"
        )
    spec = _spec(_fields(_completed(given)))
    _check_size(spec, given)
    return spec


def _fields(given: dict[str, int]) -> dict[str, object]:
    fields: dict[str, object] = {_FIELDS[name]: value for name, value in given.items() if name in _FIELDS}
    fields = {"max_position_embeddings": DEFAULT_CONTEXT} | fields
    return fields | (_LATENT if "latent" in given else {}) | {"tie_word_embeddings": False}


def _pairs(text: str) -> dict[str, int]:
    given: dict[str, int] = {}
    for pair in re.split(r"[\s,]+", text.strip()):
        match = _PAIR.fullmatch(pair)
        if match is None:
            raise UsageError(
                f"'{pair}' in the description is not a name and a number, like layers=64 or params=70B"
            )
        name = match[1].lower()
        if name not in (*_FIELDS, *_SIZES):
            raise UsageError(f"the description: {unknown_name('field', name, (*_FIELDS, *_SIZES))}")
        if name in given:
            raise UsageError(f"the description gives {name} twice")
        given[name] = round(float(match[2]) * _SCALES[match[3].lower()])
        if given[name] <= 0 and name != "dense_layers":
            raise UsageError(f"{name} in the description is {given[name]}; it must be a positive number")
    return given


def _spec(fields: dict[str, object]) -> ModelSpec:
    text = ConfigFields(Path("the description"), fields, {})
    assumed = "it is described by hand"
    return by_fields(text, "described", "described", "bf16", assumed).spec


def _completed(given: dict[str, int]) -> dict[str, int]:
    """With the widths and the experts of a token that follow from the sizes: three matrices of the hidden size."""
    without, column = _parameters_without_ffn(given), 3 * given["hidden"]
    dense = given.get("dense_layers", 0) if "experts" in given else given["layers"]
    if "ffn" not in given and "experts" not in given:
        return given | {"ffn": _width(given, without, column * dense)}
    if "ffn" not in given and dense:
        raise _missing("ffn")
    if "experts" not in given:
        return given
    without += column * given.get("ffn", 0) * dense
    shared, sparse = given.get("shared_experts", 0), given["layers"] - dense
    copies = given["experts"] + shared
    width = given.get("expert_ffn") or _width(given, without, column * max(1, sparse) * copies)
    if "experts_per_token" in given or "active" not in given:
        return given | {"expert_ffn": width}
    each = round((given["active"] - without) / (column * max(1, sparse) * width)) - shared
    return given | {"expert_ffn": width, "experts_per_token": min(max(each, 1), given["experts"])}


def _width(given: dict[str, int], without: int, of_each_column: int) -> int:
    if "params" not in given:
        raise _missing("expert_ffn" if "experts" in given else "ffn")
    width = (given["params"] - without) // of_each_column
    if width <= 0:
        raise UsageError(
            f"params={given['params']} in the description is less than its attention and tables alone take, {without}"
        )
    return width


def _missing(name: str) -> UsageError:
    return UsageError(f"the description lacks {name}; give {name}=… or params=…")


def _parameters_without_ffn(given: dict[str, int]) -> int:
    """Of attention and tables."""
    fields = _fields(given) | {"num_experts": None, "intermediate_size": 1}
    return _spec(fields).num_parameters - 3 * given["hidden"] * given["layers"]


def _check_size(spec: ModelSpec, given: dict[str, int]) -> None:
    """Raises UsageError where the widths make another size than the one that is given."""
    for name, size in (("params", spec.num_parameters), ("active", spec.active_parameters)):
        wanted = given.get(name)
        if wanted is not None and abs(size - wanted) > SIZE_TOLERANCE * wanted:
            raise UsageError(
                f"the description makes {size / 1e9:.1f} B parameters {'a token' if name == 'active' else 'in all'},"
                f" but says {name}={wanted / 1e9:.1f}B; leave {name} out, or change the widths or experts_per_token"
            )
