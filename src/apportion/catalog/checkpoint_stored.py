"""What the tensors of quantised safetensors files hold: matrices in pieces, of which a group cuts some."""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

from apportion.catalog.quantisation import Quantisation
from apportion.catalog.safetensors_header import TensorHeader
from apportion.catalog.stored import Part, StoredTensor
from apportion.types.errors import ModelError
from apportion.types.model import ModelSpec

PACKED = ("U8", "I32", "U32", "I64")
"""Types of tensors whose shapes are not those of what they hold."""
_MATRIX = re.compile(
    r".*layers\.\d+\.(?:self_attn|mlp|block_sparse_moe)\.(?:.+\.)?(w[123]|\w+?_proj(?:_with_mqa)?)(?:[._](.+))?"
)
"""Module, and what of it."""
_STACKED = re.compile(r".*\.experts\.\w+_proj([._].+)?")
"""All experts in one tensor, the first dimension being theirs."""
_OUTPUTS_CUT: dict[str, Part] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"), "ffn"),
}
_INPUTS_CUT: dict[str, Part] = {"o_proj": "attention", "down_proj": "ffn", "w2": "ffn"}
_TILES, TILE_ELEMENTS = "trellis", 16 * 16
"""Of EXL3, whose bits may differ from tile to tile."""
_DATA = frozenset((None, "weight", "qweight", "weight_packed", "blocks", _TILES))
"""Of a matrix: where its elements are."""
_PIECES = _DATA | frozenset(
    (
        "bias",
        "biases",
        "qzeros",
        "scales",
        "svh",
        "SCB",
        "weight.absmax",
        "weight_scale",
        "weight_scale_inv",
        "weight_zero_point",
    )
)
"""All that is cut with a matrix. All else, as group numbers and tables of values, every member needs."""
FILLED_SHARE = 0.02
_TABLES: dict[str, Part] = {"embed_tokens": "embedding", "lm_head": "head"}


def stored_tensors(
    spec: ModelSpec,
    by_layer: Mapping[int, Sequence[TensorHeader]],
    outside: Mapping[str, TensorHeader],
    quantisation: Quantisation,
) -> Iterator[StoredTensor]:
    for name, tensor in outside.items():
        part = _TABLES.get(name.split(".")[0], "outside")
        yield StoredTensor(layer=None, part=part, num_bytes=tensor.num_bytes)
    for layer in range(spec.num_layers):
        for tensor in by_layer[layer]:
            yield _of_layer(spec, layer, tensor, quantisation)


def check_matrices(
    folder: Path, spec: ModelSpec, by_layer: Mapping[int, Sequence[TensorHeader]], quantisation: Quantisation
) -> None:
    """Raises ModelError where a layer's matrices are not those described, apart from what fills up blocks."""
    for layer, part in enumerate(spec.layers):
        held = sum(_elements(tensor, quantisation) for tensor in by_layer[layer])
        described = (
            spec.kv_heads * part.per_kv_head.elements
            + spec.ffn_columns * part.per_ffn_column.elements
            + part.replicated.elements
        )
        if abs(held - described) > FILLED_SHARE * described:
            raise ModelError(
                f"{folder}: the matrices of layer {layer} hold {held} {quantisation.name} elements, but config.json"
                f" describes {described}; use the config.json of this checkpoint"
            )


def _elements(tensor: TensorHeader, quantisation: Quantisation) -> int:
    match = _MATRIX.fullmatch(tensor.name)
    if match is None or match[2] not in _DATA:
        return 0
    if match[2] == _TILES:
        return prod(tensor.shape[:2]) * TILE_ELEMENTS
    return tensor.num_bytes * 8 // quantisation.bits if tensor.dtype in PACKED else tensor.num_elements


def _of_layer(spec: ModelSpec, layer: int, tensor: TensorHeader, quantisation: Quantisation) -> StoredTensor:
    match = _MATRIX.fullmatch(tensor.name)
    module, piece = (match[1], match[2]) if match else ("", None)
    part, block_elements = _OUTPUTS_CUT.get(module, "replicated") if piece in _PIECES else "replicated", 1
    if module in _INPUTS_CUT and piece in _PIECES and _along_inputs(spec, tensor):
        part, block_elements = _INPUTS_CUT[module], quantisation.block_elements
    return StoredTensor(layer=layer, part=part, num_bytes=tensor.num_bytes, block_elements=block_elements)


def _along_inputs(spec: ModelSpec, tensor: TensorHeader) -> bool:
    """Whether there is more than one element of a row, so that they follow the inputs."""
    copies = tensor.shape[0] if _STACKED.fullmatch(tensor.name) else 1
    return tensor.num_elements // max(1, copies) > spec.hidden_size
