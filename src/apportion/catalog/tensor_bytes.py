"""What tensors with roles take, part by part: as the files hold them, or by the formula of how they are quantised."""

from collections.abc import Iterator
from math import ceil, prod

from apportion.catalog.layout import CUT_BY_COLUMNS, CUT_BY_HEADS, INPUTS_CUT
from apportion.catalog.quantisation import Quantisation
from apportion.catalog.stored import Part, StoredTensor
from apportion.catalog.tensor_roles import NamedTensor, RoledTensor, SortedTensors

_NEVER_QUANTISED = ("other", "conv", "state")
"""Roles: norms, routers, convolutions and what belongs to a state."""
FLOAT_BYTES = 2


def sorted_bytes(found: SortedTensors, quantisation: Quantisation) -> Iterator[StoredTensor]:
    for number, layer in enumerate(found.layers):
        for one in layer:
            yield _of_layer(number, one, quantisation)
    for tensor in found.embedding:
        yield _table(tensor, "embedding", quantisation)
    for tensor in found.head:
        yield _table(tensor, "head", quantisation)
    for tensor in found.outside:
        part: Part = "outside" if len(tensor.shape) == 1 and "norm" in tensor.name else "beside_embedding"
        yield StoredTensor(layer=None, part=part, num_bytes=_float_bytes(tensor))


def _of_layer(number: int, one: RoledTensor, quantisation: Quantisation) -> StoredTensor:
    part: Part = "replicated"
    if one.role in CUT_BY_HEADS:
        part = "attention"
    elif one.role in CUT_BY_COLUMNS:
        part = "ffn"
    method = _method(one, quantisation)
    return StoredTensor(
        layer=number,
        part=part,
        num_bytes=_bytes(one.tensor, method),
        block_elements=method.block_elements if method and one.role in INPUTS_CUT else 1,
    )


def _method(one: RoledTensor, quantisation: Quantisation) -> Quantisation | None:
    if one.role in _NEVER_QUANTISED or len(one.tensor.shape) < 2:
        return None
    if quantisation.experts_only and one.role not in ("expert", "expert_down"):
        return None
    return quantisation.of(one.tensor.name.removesuffix(".weight"))


def _bytes(tensor: NamedTensor, method: Quantisation | None) -> int:
    if tensor.num_bytes is not None:
        return tensor.num_bytes
    if method is None:
        return _float_bytes(tensor)
    *copies, rows, columns = tensor.shape
    beside = prod(copies) * (rows * method.row_bytes + columns * method.input_bytes)
    return ceil(tensor.elements * method.element_bits / 8) + beside


def _table(tensor: NamedTensor, part: Part, quantisation: Quantisation) -> StoredTensor:
    bits = quantisation.embedding_bits if part == "embedding" else quantisation.head_bits
    size = (
        _float_bytes(tensor)
        if bits is None or tensor.num_bytes is not None
        else ceil(tensor.elements * bits / 8)
    )
    return StoredTensor(layer=None, part=part, num_bytes=size)


def _float_bytes(tensor: NamedTensor) -> int:
    return FLOAT_BYTES * tensor.elements if tensor.num_bytes is None else tensor.num_bytes
