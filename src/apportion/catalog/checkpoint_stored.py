"""What the tensors of quantised safetensors files hold: matrices in pieces, of which a group cuts some."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from apportion.catalog.quantisation import Quantisation
from apportion.catalog.safetensors_header import TensorHeader
from apportion.catalog.stored import Part, StoredTensor
from apportion.types.errors import ModelError
from apportion.types.model import LayerSpec, ModelSpec

_MATRIX = re.compile(
    r".*layers\.\d+\.((?:self_attn|mlp|block_sparse_moe)\.(?:.+\.)?(w[123]|\w+?_proj))(?:[._](.+))?"
)
"""Module, its last name, and what of it."""
_STACKED = re.compile(r".*\.experts\.\w+_proj([._].+)?")
"""All experts in one tensor, the first dimension being theirs."""
_OUTPUTS_CUT: dict[str, Part] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"), "ffn"),
}
_INPUTS_CUT: dict[str, Part] = {"o_proj": "attention", "down_proj": "ffn", "w2": "ffn"}
_PIECES = frozenset(
    (
        None,
        "weight",
        "bias",
        "qweight",
        "qzeros",
        "scales",
        "blocks",
        "SCB",
        "weight.absmax",
        "weight_packed",
        "weight_scale",
        "weight_scale_inv",
        "weight_zero_point",
    )
)
"""Of a matrix: those that are cut with it. All else, as group numbers and tables of values, every member needs."""
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


def check_alike(folder: Path, spec: ModelSpec, by_layer: Mapping[int, Sequence[TensorHeader]]) -> None:
    """Packed parameters cannot be counted: layers described alike must have the same matrices. Raises ModelError."""
    known: dict[LayerSpec, set[str]] = {}
    for layer, described in enumerate(spec.layers):
        held = {match[1] for tensor in by_layer[layer] if (match := _MATRIX.fullmatch(tensor.name))}
        expected = known.setdefault(described, held)
        if held != expected:
            raise ModelError(
                f"{folder}: {min(held ^ expected)} is in one of the layers {spec.layers.index(described)} and {layer},"
                " but not in the other, which config.json describes alike; download the files again"
            )


def _of_layer(spec: ModelSpec, layer: int, tensor: TensorHeader, quantisation: Quantisation) -> StoredTensor:
    match = _MATRIX.fullmatch(tensor.name)
    module, piece = (match[2], match[3]) if match else ("", None)
    part, block_elements = _OUTPUTS_CUT.get(module, "replicated") if piece in _PIECES else "replicated", 1
    if module in _INPUTS_CUT and piece in _PIECES and _along_inputs(spec, tensor):
        part, block_elements = _INPUTS_CUT[module], quantisation.block_elements
    return StoredTensor(layer=layer, part=part, num_bytes=tensor.num_bytes, block_elements=block_elements)


def _along_inputs(spec: ModelSpec, tensor: TensorHeader) -> bool:
    """Whether there is more than one element of a row, so that they follow the inputs."""
    copies = tensor.shape[0] if _STACKED.fullmatch(tensor.name) else 1
    return tensor.num_elements // max(1, copies) > spec.hidden_size
