"""What weights take in each format.

int8: a byte an element, and beside each output row a scale and the sum of its elements (fp32 and int32).
int4: 32 elements in 16 bytes and an fp16 scale, 4.5 bits each (llama.cpp's q4_0); rounded up per unit of an axis.
Both keep the table that tokens are looked up in as int8 rows with their scales. Packed weights cannot be looked up in,
so only where weights are stored as activations are does a tied head share the embedding's table.
"""

from dataclasses import dataclass

from apportion.types.layout import INT8_ROW_BYTES
from apportion.types.model import ModelSpec, Parameters
from apportion.types.units import FORMAT_BYTES

INT8_SCALE_BYTES = 4
INT4_GROUP_ELEMENTS, INT4_GROUP_BYTES = 32, 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """Of a stage's matrices, and of all else in it: hidden states, KV cache, norms, biases, routers."""

    weights: str
    activations: str

    @property
    def activation_bytes(self) -> int:
        return FORMAT_BYTES[self.activations]

    @property
    def packed(self) -> bool:
        return self.weights != self.activations


def matrix_bytes(elements: int, rows: int, weight_format: str) -> int:
    if weight_format == "int8":
        return elements + rows * INT8_ROW_BYTES
    if weight_format == "int4":
        return -(-elements * INT4_GROUP_BYTES // INT4_GROUP_ELEMENTS)
    return elements * FORMAT_BYTES[weight_format]


def parameters_bytes(parameters: Parameters, formats: Formats) -> int:
    matrices = matrix_bytes(parameters.elements, parameters.rows, formats.weights)
    return matrices + parameters.others * formats.activation_bytes


def head_row_bytes(model: ModelSpec, formats: Formats) -> int:
    return matrix_bytes(model.hidden_size, 1, formats.weights)


def _looked_up_row_bytes(model: ModelSpec, formats: Formats) -> int:
    if formats.weights in FORMAT_BYTES:
        return model.hidden_size * FORMAT_BYTES[formats.weights]
    return model.hidden_size + INT8_SCALE_BYTES


def vocab_row_bytes(model: ModelSpec, formats: Formats, *, has_embedding: bool, has_head: bool) -> int:
    """Of one row of the tables that a stage holds."""
    embedding_bytes = _looked_up_row_bytes(model, formats) if has_embedding else 0
    if has_embedding and model.tied_embeddings and not formats.packed:
        return embedding_bytes
    return embedding_bytes + (head_row_bytes(model, formats) if has_head else 0)
