"""A ModelSpec from a model's tensors, whatever its family: sizes are exact, roles are told by names.

Query, key, value and output matrices are cut by KV heads and FFN matrices by columns, as tensor-parallel engines do;
everything else of a layer counts on every member of a group, and so does what an axis leaves over.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

from apportion.catalog.facts import Facts
from apportion.catalog.tensor_roles import NamedTensor, Role, RoledTensor, SortedTensors, sort_tensors
from apportion.types.errors import ModelError
from apportion.types.model import LayerCache, LayerSpec, ModelSpec, Parameters

CUT_BY_HEADS: tuple[Role, ...] = ("q", "k", "v", "qkv", "mixed", "o")
CUT_BY_COLUMNS: tuple[Role, ...] = ("ffn", "down", "expert", "expert_down", "shared", "shared_down")
INPUTS_CUT: tuple[Role, ...] = ("o", "down", "expert_down", "shared_down")
STATE_ELEMENT_BYTES = 4
"""Engines keep recurrent states in fp32."""
KEY_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A model's tensors with their roles, and how many units the axes have."""

    sorted: SortedTensors
    spec: ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    """What one layer's tensors say of its attention."""

    key_elements: int
    """Of a token's keys and values, all KV heads together."""
    whole_elements: int
    width: int
    """Of all heads' outputs: inputs of the output projection."""
    kv_heads: int
    """0 where a layer has none."""
    state_bytes: int


def lay_out(
    name: str, family: str, tensors: Sequence[NamedTensor], facts: Facts, checkpoint_format: str, source: str
) -> Layout:
    """`source` names the model in errors. Raises ModelError where no table or no layers are found."""
    found = sort_tensors(tensors, facts.num_layers)
    if "encoder" in found.prefix:
        raise ModelError(
            f"{source}: '{family}' is an encoder, which cannot be planned; use a decoder-only language model"
        )
    table = max(found.embedding, key=lambda one: one.elements, default=None)
    if table is None or len(table.shape) != 2 or not any(found.layers):
        raise ModelError(
            f"{source}: no vocabulary table or no layers are found among its tensors; it cannot be planned"
        )
    vocab_rows, hidden = table.shape
    attentions = [_attention(layer, number, facts, hidden) for number, layer in enumerate(found.layers)]
    attentions = _with_shared_blocks(attentions, facts)
    latent = facts.latent_rank is not None and any(one.whole_elements for one in attentions)
    q_heads = facts.heads
    kv_heads = q_heads if latent else gcd(*(one.kv_heads for one in attentions)) or 1
    if q_heads % kv_heads:
        kv_heads = gcd(kv_heads, q_heads)
    columns = gcd(*(width for layer in found.layers for width in _widths(layer, hidden))) or 1
    others = sum(one.elements for one in (*found.outside, *found.embedding, *found.head) if one is not table)
    head = max(found.head, key=lambda one: one.elements, default=None)
    spec = ModelSpec(
        name=name,
        family=family,
        fingerprint="",
        layers=tuple(
            _layer(layer, attention, number, facts, kv_heads=kv_heads, columns=columns)
            for number, (layer, attention) in enumerate(zip(found.layers, attentions, strict=True))
        ),
        hidden_size=hidden,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=max(1, max(one.width for one in attentions) // q_heads),
        ffn_columns=columns,
        vocab_rows=vocab_rows,
        tied_embeddings=head is None,
        max_context_tokens=facts.max_context_tokens,
        checkpoint_format=checkpoint_format,
        beside_embedding=max(0, others - (head.elements if head else 0) - hidden),
        notes=_notes(found, facts, attentions),
    )
    return Layout(sorted=found, spec=spec)


def _attention(layer: Sequence[RoledTensor], number: int, facts: Facts, hidden: int) -> _Attention:
    outputs: dict[Role, int] = defaultdict(int)
    for one in layer:
        if len(one.tensor.shape) > 1:
            outputs[one.role] += one.tensor.outputs(hidden)
    width = max((_inputs(one.tensor, hidden) for one in layer if one.role == "o"), default=0)
    keys = outputs["k"] + (outputs["v"] or outputs["k"])
    if not keys and outputs["qkv"]:
        keys = max(0, outputs["qkv"] - width)
    whole = outputs["kv_latent"] + outputs["kv_shared"] + outputs["index_key"]
    if facts.stateful[number] and not facts.keys_expected[number]:
        keys = whole = 0
    head_dim = max(1, width // facts.heads)
    kv_heads = max(1, (outputs["v"] or outputs["k"] or keys // 2) // head_dim) if keys else 0
    keeps_state = facts.stateful[number] or any(one.role == "state" for one in layer)
    if keeps_state or not (keys or whole):
        state = _state_bytes(layer, width or hidden, facts, recurrent=keeps_state)
    else:
        state = 0
    if number >= facts.first_sharing:
        keys = whole = 0
    if facts.compression[number] > 1:
        state += KEY_BYTES * facts.recent_tokens * whole
    return _Attention(
        key_elements=keys,
        whole_elements=-(-whole // facts.compression[number]),
        width=width,
        kv_heads=kv_heads,
        state_bytes=state,
    )


def _state_bytes(layer: Sequence[RoledTensor], width: int, facts: Facts, *, recurrent: bool) -> int:
    """Of a recurrent state of `width` × the state's own width, and the last inputs of convolutions."""
    inputs = 2 * sum(one.tensor.elements for one in layer if one.role == "conv")
    return inputs + recurrent * STATE_ELEMENT_BYTES * width * facts.state_width


def _with_shared_blocks(attentions: Sequence[_Attention], facts: Facts) -> list[_Attention]:
    """Layers that read a context through a block that they share stand with the keys of the one that holds it."""
    most = max(attentions, key=lambda one: one.key_elements)
    return [
        replace(one, key_elements=most.key_elements, kv_heads=most.kv_heads, width=most.width)
        if facts.keys_expected[number] and not one.key_elements
        else one
        for number, one in enumerate(attentions)
    ]


def _inputs(tensor: NamedTensor, hidden: int) -> int:
    rows, columns = tensor.shape[-2:]
    return columns if rows == hidden or columns != hidden else rows


def _widths(layer: Sequence[RoledTensor], hidden: int) -> list[int]:
    """Of a layer's FFN, its experts and those shared."""
    return [
        _inputs(one.tensor, hidden) for one in layer if one.role in ("down", "expert_down", "shared_down")
    ]


def _layer(
    layer: Sequence[RoledTensor],
    attention: _Attention,
    number: int,
    facts: Facts,
    *,
    kv_heads: int,
    columns: int,
) -> LayerSpec:
    by_heads = _parameters(layer, CUT_BY_HEADS)
    by_columns = _parameters(layer, CUT_BY_COLUMNS)
    rest = _parameters(layer, ())
    per_head, heads_left = _divided(by_heads, kv_heads)
    per_column, columns_left = _divided(by_columns, columns)
    experts, per_token = _experts(layer, facts)
    return LayerSpec(
        per_kv_head=per_head,
        per_ffn_column=per_column,
        replicated=Parameters(
            elements=rest.elements + heads_left.elements + columns_left.elements,
            rows=rest.rows + heads_left.rows + columns_left.rows,
            others=rest.others,
        ),
        window_tokens=facts.windows[number] if attention.key_elements or attention.whole_elements else None,
        num_experts=experts,
        experts_per_token=per_token,
        cache=_cache(attention, facts, kv_heads),
    )


def _parameters(layer: Sequence[RoledTensor], roles: Sequence[Role]) -> Parameters:
    """Those that have one of the roles; without any, those that are cut along no axis, and the rows of inputs cut."""
    mine = [
        one
        for one in layer
        if one.role in roles or (not roles and one.role not in CUT_BY_HEADS + CUT_BY_COLUMNS)
    ]
    matrices = [
        one for one in mine if len(one.tensor.shape) > 1 and one.role not in ("other", "conv", "state")
    ]
    rows = sum(_rows(one.tensor) for one in matrices if one.role not in INPUTS_CUT)
    if not roles:
        rows += sum(_rows(one.tensor) for one in layer if one.role in INPUTS_CUT)
    elements = sum(one.tensor.elements for one in matrices)
    return Parameters(
        elements=elements, rows=rows, others=sum(one.tensor.elements for one in mine) - elements
    )


def _rows(tensor: NamedTensor) -> int:
    """Of a matrix, or of all experts' that are in one tensor."""
    *copies, rows, _ = tensor.shape
    return prod(copies) * rows


def _divided(whole: Parameters, units: int) -> tuple[Parameters, Parameters]:
    """Of one unit, and what is left over."""
    each = Parameters(
        elements=whole.elements // units, rows=-(-whole.rows // units), others=whole.others // units
    )
    left = Parameters(elements=whole.elements % units + whole.others % units, rows=0, others=0)
    return each, left


def _experts(layer: Sequence[RoledTensor], facts: Facts) -> tuple[int, int]:
    """Those shared, and a dense FFN beside, count as experts of the same size to which every token is routed."""
    down = [one.tensor for one in layer if one.role == "expert_down"]
    if not down:
        return 0, 0
    routed = sum(one.shape[0] if len(one.shape) > 2 else 1 for one in down)
    size = sum(one.elements for one in down) // routed
    beside = sum(one.tensor.elements for one in layer if one.role in ("shared_down", "down"))
    always = -(-beside // size) if size else 0
    return routed + always, min(routed, facts.experts_per_token) + always


def _cache(attention: _Attention, facts: Facts, kv_heads: int) -> LayerCache:
    if facts.latent_rank is not None and attention.whole_elements:
        # Every head's query meets the latent as a key, and the rank's part of it as a value.
        return LayerCache(
            per_kv_head=0,
            whole=attention.whole_elements,
            products_per_kv_head=attention.whole_elements + facts.latent_rank,
        )
    per_head, left = divmod(attention.key_elements, kv_heads)
    reads_context = attention.key_elements or attention.whole_elements or not attention.state_bytes
    return LayerCache(
        per_kv_head=per_head,
        whole=attention.whole_elements + left,
        products_per_kv_head=2 * attention.width // kv_heads if reads_context else 0,
        state_bytes=attention.state_bytes,
    )


def _notes(found: SortedTensors, facts: Facts, attentions: Sequence[_Attention]) -> tuple[str, ...]:
    notes: list[str] = []
    left_out = sum(one.elements for one in found.towers)
    if left_out:
        notes.append(
            f"{left_out / 1e9:.2f} B parameters beside the language model (images, sound, multi-token prediction)"
            " are left out"
        )
    if facts.assumed:
        notes.append(f"the config does not say, so taken: {', '.join(facts.assumed)}")
    states = [one.state_bytes for one in attentions if one.state_bytes]
    if states:
        notes.append(
            f"{len(states)} of {len(attentions)} layers keep a constant state, taken as {sum(states) / 2**20:.0f} MiB a"
            " sequence in all, whatever its context"
        )
    if any(
        one.role == "index_key" or "compressor" in one.tensor.name for layer in found.layers for one in layer
    ):
        notes.append("attention is sparse: its time is counted as if every token of the context were read")
    return tuple(notes)
