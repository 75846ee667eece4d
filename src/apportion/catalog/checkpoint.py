"""A ModelSpec held against the tensors of its checkpoint: what is planned is then what the files hold.

Tensors that are named alike in every family are compared by shape; whatever else a layer holds counts in the sum of
its parameters.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from apportion.catalog.checkpoint_stored import PACKED, check_matrices, stored_tensors
from apportion.catalog.quantisation import Quantisation
from apportion.catalog.safetensors_header import TensorHeader
from apportion.catalog.stored import with_stored
from apportion.types.errors import ModelError
from apportion.types.model import ModelSpec

FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_NOT_PARAMETERS = re.compile(r".*(rotary_emb\.inv_freq|masked_bias|attn\.bias)")
"""Buffers that older files hold."""
_EXTRA_LAYER = "eh_proj.weight"
"""In a module for multi-token prediction, which is stored as one more layer and not planned."""

Shape = tuple[int, ...]


def with_checkpoint(
    folder: Path, spec: ModelSpec, headers: Sequence[TensorHeader], quantisation: Quantisation | None
) -> ModelSpec:
    """The spec with the weight format of the files, or the bytes of quantised ones. Raises ModelError where they hold
    other tensors than those described."""
    tensors = [tensor for tensor in headers if not _NOT_PARAMETERS.fullmatch(tensor.name)]
    if quantisation is None:
        spec = replace(spec, checkpoint_format=checkpoint_format(tensors))
    by_layer: dict[int, list[TensorHeader]] = defaultdict(list)
    outside: dict[str, TensorHeader] = {}
    for tensor in tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match:
            by_layer[int(match[1])].append(tensor)
        else:
            outside[tensor.name.removeprefix("model.")] = tensor
    _check_tables(folder, spec, outside)
    for layer in sorted({*by_layer, *range(spec.num_layers)}):
        _check_layer(folder, spec, layer, by_layer[layer], quantised=quantisation is not None)
    if quantisation is None:
        return spec
    check_matrices(folder, spec, by_layer, quantisation)
    return with_stored(
        spec, quantisation.name, "safetensors", stored_tensors(spec, by_layer, outside, quantisation)
    )


def checkpoint_format(tensors: Sequence[TensorHeader]) -> str:
    """The format that holds most of the parameters."""
    elements: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype not in FORMATS:
            raise ModelError(
                f"{tensor.file}: tensor '{tensor.name}' is {tensor.dtype}, so the checkpoint is quantised, but"
                " config.json has no 'quantization_config'; use the config.json of this checkpoint"
            )
        elements[FORMATS[tensor.dtype]] += tensor.num_elements
    if not elements:
        raise ModelError("the checkpoint's files hold no tensors; download them again")
    return elements.most_common(1)[0][0]


def _check_tables(folder: Path, spec: ModelSpec, outside: Mapping[str, TensorHeader]) -> None:
    table = (spec.vocab_rows, spec.hidden_size)
    expected: dict[str, Shape] = {"embed_tokens.weight": table, "norm.weight": (spec.hidden_size,)}
    if not spec.tied_embeddings:
        expected["lm_head.weight"] = table
    for name, shape in expected.items():
        if name in outside:
            _check_shape(outside[name], shape)
        elif not any(other.startswith(name.removesuffix("weight")) for other in outside):
            tied = " (or 'tie_word_embeddings')" if name == "lm_head.weight" else ""
            raise ModelError(
                f"{folder} has no tensor '{name}', which config.json describes as {list(shape)}{tied};"
                " use the config.json of this checkpoint"
            )


def _check_layer(
    folder: Path, spec: ModelSpec, layer: int, tensors: Sequence[TensorHeader], *, quantised: bool
) -> None:
    if layer >= spec.num_layers:
        if any(tensor.name.endswith(_EXTRA_LAYER) for tensor in tensors):
            return
        raise ModelError(
            f"{tensors[0].file}: tensor '{tensors[0].name}' {list(tensors[0].shape)} is of layer {layer},"
            f" but config.json describes {spec.num_layers} layers; use the config.json of this checkpoint"
        )
    shapes = _layer_shapes(spec, layer)
    for tensor in tensors:
        name = tensor.name.split(f"layers.{layer}.", 1)[1]
        if name in shapes:
            _check_shape(tensor, shapes[name])
    if quantised and tensors:
        return
    held, described = sum(tensor.num_elements for tensor in tensors), spec.layer_parameters(layer)
    if held != described:
        raise ModelError(
            f"{folder}: the {len(tensors)} tensors of layer {layer} hold {held} parameters, but config.json"
            f" describes {described}{_culprit(tensors, held - described)}; use the config.json of this checkpoint"
        )


def _layer_shapes(spec: ModelSpec, layer: int) -> dict[str, Shape]:
    hidden = spec.hidden_size
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if spec.kv_lora_rank is None:
        q_width, kv_width = spec.q_heads * spec.head_dim, spec.kv_heads * spec.head_dim
        widths = {
            "q_proj": q_width,
            "k_proj": kv_width,
            "v_proj": kv_width,
            "qkv_proj": q_width + 2 * kv_width,
        }
        for name, width in widths.items():
            shapes[f"self_attn.{name}.weight"], shapes[f"self_attn.{name}.bias"] = (width, hidden), (width,)
        shapes["self_attn.o_proj.weight"] = (hidden, q_width)
    part = spec.layers[layer]
    if part.num_experts == 0:
        width = spec.ffn_columns * (part.per_ffn_column.elements // (3 * hidden))
        shapes |= {"mlp.gate_proj.weight": (width, hidden), "mlp.up_proj.weight": (width, hidden)}
        shapes |= {"mlp.down_proj.weight": (hidden, width), "mlp.gate_up_proj.weight": (2 * width, hidden)}
    return shapes


def _check_shape(tensor: TensorHeader, shape: Shape) -> None:
    if tensor.shape != shape and tensor.dtype not in PACKED:
        raise ModelError(
            f"{tensor.file}: tensor '{tensor.name}' has shape {list(tensor.shape)}, but config.json describes"
            f" {list(shape)}; use the config.json of this checkpoint"
        )


def _culprit(tensors: Sequence[TensorHeader], excess: int) -> str:
    """Names a tensor that explains a difference by itself, if there is one."""
    alone = next((tensor for tensor in tensors if tensor.num_elements == excess), None)
    return f" (without '{alone.name}' {list(alone.shape)}, as many)" if alone else ""
