"""What a tensor is for, by its name: the names that model families of transformers, their checkpoints and GGUF use.

A layer's tensors are those under the longest list of layers; what stands under another prefix belongs to a tower for
images or sound, or to a module for multi-token prediction.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

Role = Literal[
    "q", "k", "v", "qkv", "o", "mixed", "kv_latent", "kv_shared", "index_key", "attention",
    "ffn", "down", "expert", "expert_down", "shared", "shared_down", "state", "conv", "other",
]  # fmt: skip
"""Of a layer's matrices. "mixed": into the heads, but neither queries, keys nor values. "attention": of attention, but
needed whole by every member of a group."""

_LAYER = re.compile(r"((?:.*?\.)?(?:layers?|h|blocks?|blk))\.(\d+)\.(.+)")
"""The outermost numbered list: experts and convolutions are numbered inside."""
_TOWER = re.compile(
    r"visi|visual|image|audio|speech|sound|mm_proj|multi_modal|video|(?:^|\.)(?:mtp|nextn)\b", re.IGNORECASE
)
_ENDS = re.compile(
    r"\.(?:weight|bias|qweight|qzeros|scales|scale|biases|g_idx|weight_packed|weight_scale(?:_inv|_2)?|weight_shape"
    r"|weight_global_scale|input_scale|input_global_scale|k_scale|v_scale|linear|blocks|absmax)$"
)
_EMBEDDING = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings?|embed_in|embeddings?|tok_embeddings|token_embd|embed|word_embed)"
)
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|output|embed_out|head|output_layer)")
_LEAVES: tuple[tuple[Role, str], ...] = (
    ("index_key", r"indexer\.(?:wk|k_proj|kv_proj)"),
    ("attention", r"q_a_proj|attn_q_a|q_down_proj|indexer\..*|compressor\..*|wq_a"),
    ("kv_latent", r"kv_a_proj_with_mqa|kv_a_proj|attn_kv_a_mqa|kv_down_proj"),
    ("kv_shared", r"kv_proj|wkv"),
    ("qkv", r"qkv_proj|query_key_value|c_attn|Wqkv|wqkv|qkv|attn_qkv|att_proj"),
    ("k", r"k_proj|key|attn_k|wk"),
    ("v", r"v_proj|value|attn_v|wv"),
    ("q", r"q_proj|query|attn_q|wq"),
    (
        "o",
        r"o_proj|out_proj|dense|attn_output|wo|o_b_proj|wo_b|attn_out|output|(?:attn|attention)\.c_proj|ssm_out",
    ),
    (
        "mixed",
        r"q_b_proj|kv_b_proj|attn_q_b|attn_kv_b|attn_k_b|attn_v_b|o_a_proj|g_proj|in_proj\w*|ssm_in|attn_gate|wq_b|wo_a",
    ),
)
_NUMBERS = re.compile(r"\.\d+\.")
_FFN_DOWN = re.compile(
    r"down_proj|w2|fc2|c_proj|dense_4h_to_h|wo|output_linear|ff_out|fc_out|ffn_down\w*|w_out|proj_down|value"
)
_STATE = re.compile(
    r"(?:^|\.)(?:A_log|dt_bias|dt_proj|x_proj|ssm_\w+|time_\w+|conv1d|\w_conv1d|\w+gate_preact|recurrent_param)(?:\.|$)"
)
_ATTENTION = re.compile(
    r"attn|mlstm|attention|mixer|mamba|ssm|temporal_block|time_mix|(?:^|\.)conv\b|indexer|compressor"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTensor:
    """`elements` is what it holds, unpacked: 0 of scales and zero points of quantised matrices."""

    name: str
    shape: tuple[int, ...]
    elements: int
    num_bytes: int | None = None
    """In the model's files; None where there are none."""

    @classmethod
    def of_shape(cls, name: str, shape: Sequence[int]) -> "NamedTensor":
        return cls(name=name, shape=tuple(shape), elements=prod(shape))

    def outputs(self, inputs: int) -> int:
        """Rows of a matrix, whichever way round it is stored."""
        rows, columns = self.shape[-2:]
        return rows if columns == inputs or rows != inputs else columns


@dataclass(frozen=True, slots=True, kw_only=True)
class RoledTensor:
    tensor: NamedTensor
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedTensors:
    """`outside` is the language model's own, in no layer; `towers` is all that is not planned."""

    prefix: str
    """Of the layers' names."""
    layers: tuple[tuple[RoledTensor, ...], ...]
    embedding: tuple[NamedTensor, ...]
    head: tuple[NamedTensor, ...]
    outside: tuple[NamedTensor, ...]
    towers: tuple[NamedTensor, ...]


def sort_tensors(tensors: Sequence[NamedTensor], num_layers: int | None) -> SortedTensors:
    """Layers beyond `num_layers` are modules for multi-token prediction."""
    by_prefix: dict[str, dict[int, list[NamedTensor]]] = defaultdict(lambda: defaultdict(list))
    loose: list[NamedTensor] = []
    towers: list[NamedTensor] = []
    for tensor in tensors:
        match = _LAYER.fullmatch(tensor.name)
        if _TOWER.search(tensor.name):
            towers.append(tensor)
        elif match:
            by_prefix[match[1]][int(match[2])].append(tensor)
        else:
            loose.append(tensor)
    main = max(
        by_prefix, key=lambda prefix: sum(_elements(one) for one in by_prefix[prefix].values()), default=""
    )
    layers = by_prefix.pop(main, {})
    towers += [tensor for others in by_prefix.values() for one in others.values() for tensor in one]
    count = num_layers or max(layers, default=-1) + 1
    towers += [tensor for number, one in layers.items() if number >= count for tensor in one]
    embedding = [tensor for tensor in loose if _EMBEDDING.fullmatch(_module(tensor.name))]
    head = [tensor for tensor in loose if _HEAD.fullmatch(_module(tensor.name))]
    return SortedTensors(
        prefix=main,
        layers=tuple(_with_roles(layers.get(number, ()), len(main)) for number in range(count)),
        embedding=tuple(embedding),
        head=tuple(head),
        outside=tuple(tensor for tensor in loose if tensor not in embedding and tensor not in head),
        towers=tuple(towers),
    )


def _elements(tensors: Sequence[NamedTensor]) -> int:
    return sum(tensor.elements for tensor in tensors)


def _module(name: str) -> str:
    """Without what of a module a tensor is."""
    shorter = _ENDS.sub("", name)
    return shorter if shorter == name else _module(shorter)


def _with_roles(tensors: Sequence[NamedTensor], prefix_length: int) -> tuple[RoledTensor, ...]:
    paths = [_module(tensor.name[prefix_length + 1 :].partition(".")[2]) for tensor in tensors]
    stateful = {path.rpartition(".")[0] for path in paths if _STATE.search(path)}
    return tuple(
        RoledTensor(
            tensor=tensor,
            role=_role(
                _NUMBERS.sub(".", path),
                matrix=len(tensor.shape) > 1,
                keeps_state=path.rpartition(".")[0] in stateful,
            ),
        )
        for tensor, path in zip(tensors, paths, strict=True)
    )


@cache
def _role(path: str, *, matrix: bool, keeps_state: bool) -> Role:
    """`path` is without the numbers of experts; `keeps_state` is of its module."""
    role = _role_anywhere(path, matrix=matrix, keeps_state=keeps_state)
    return "mixed" if keeps_state and role in ("q", "k", "v", "qkv", "kv_latent") else role


def _role_anywhere(path: str, *, matrix: bool, keeps_state: bool) -> Role:
    leaf = path.rsplit(".", 1)[-1]
    if not matrix or re.search(r"norm|(?:^|\.)ln_", leaf):
        return "state" if keeps_state and _STATE.search(path) else "other"
    if re.search(r"conv", leaf):
        return "conv"
    if re.search(r"experts\b|_exps\b|expert_mlp", path) and not re.search(r"shared_exp", path):
        return "expert_down" if _FFN_DOWN.fullmatch(leaf) else "expert"
    if re.search(r"router|gate_inp|(?:^|\.)(?:gate|wg|shared_expert_gate)$", path):
        return "other"
    if re.search(r"shared_(?:expert|mlp)|shexp", path):
        return "shared_down" if _FFN_DOWN.fullmatch(leaf) else "shared"
    if _ATTENTION.search(path) or leaf.startswith("self_"):
        return _attention_role(path, leaf)
    return "down" if _FFN_DOWN.fullmatch(leaf) else _ffn_or_other(leaf)


def _attention_role(path: str, leaf: str) -> Role:
    if re.search(r"(?:^|\.)(?:up_proj|gate_proj|down_proj|fc1|fc2)$", path):
        return "down" if _FFN_DOWN.fullmatch(leaf) else "ffn"
    for role, pattern in _LEAVES:
        if re.search(rf"(?:^|\.)(?:{pattern})$", path):
            return role
    return "attention"


def _ffn_or_other(leaf: str) -> Role:
    known = (
        r"(?:gate|up|gate_up)_proj|w[13]|v1|fc1|fc_in|c_fc\w*|dense_h_to_4h|wi\w*|proj_up\w*|key|receptance"
        r"|ffn_(?:gate|up)\w*|input_linear|ff_proj|w_in|gate_up|up|gate"
    )
    return "ffn" if re.fullmatch(known, leaf) else "other"
