"""What weights take in each format.

int8: a byte an element, and beside each output row its scale (fp32).
int4: 32 elements in 16 bytes and an fp16 scale, 4.5 bits each (llama.cpp's q4_0); rounded up per unit of an axis.
Both keep the table that tokens are looked up in as int8 rows with their scales. Packed weights cannot be looked up in,
so only where weights are stored as activations are does a tied head share the embedding's table.
As the model's quantised files have them ("q4_k_m", "mxfp4": any other name): what these hold, norms and tables too.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from apportion.types.layout import INT8_ROW_BYTES
from apportion.types.model import ModelSpec, Parameters
from apportion.types.units import FORMAT_BYTES, KV_BITS, WEIGHT_BITS

INT4_GROUP_ELEMENTS, INT4_GROUP_BYTES = 32, 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """Of a stage's matrices, of its KV cache, and of all else in it: hidden states, norms, biases, routers."""

    weights: str
    activations: str
    kv: str

    @property
    def activation_bytes(self) -> int:
        return FORMAT_BYTES[self.activations]

    @property
    def kv_bits(self) -> float:
        """Of one element of a key or value."""
        return KV_BITS[self.kv]

    @property
    def packed(self) -> bool:
        return self.weights != self.activations

    @property
    def as_stored(self) -> bool:
        return self.weights not in WEIGHT_BITS


def kv_bytes(elements: int, kv_format: str) -> int:
    return -(-elements * round(2 * KV_BITS[kv_format]) // 16)


def matrix_bytes(elements: int, rows: int, weight_format: str) -> int:
    if weight_format == "int8":
        return elements + rows * INT8_ROW_BYTES
    if weight_format == "int4":
        return -(-elements * INT4_GROUP_BYTES // INT4_GROUP_ELEMENTS)
    return elements * FORMAT_BYTES[weight_format]


def parameters_bytes(parameters: Parameters, formats: Formats) -> int:
    if formats.as_stored:
        return parameters.stored_bytes
    matrices = matrix_bytes(parameters.elements, parameters.rows, formats.weights)
    return matrices + parameters.others * formats.activation_bytes


def head_row_bytes(model: ModelSpec, formats: Formats) -> int:
    if formats.as_stored:
        return model.stored.head_row_bytes if model.stored else 0
    return matrix_bytes(model.hidden_size, 1, formats.weights)


def _looked_up_row_bytes(model: ModelSpec, formats: Formats) -> int:
    if formats.as_stored:
        return model.stored.embedding_row_bytes if model.stored else 0
    if formats.weights in FORMAT_BYTES:
        return model.hidden_size * FORMAT_BYTES[formats.weights]
    return model.hidden_size + INT8_ROW_BYTES


def vocab_row_bytes(model: ModelSpec, formats: Formats, *, has_embedding: bool, has_head: bool) -> int:
    """Of one row of the tables that a stage holds."""
    embedding_bytes = _looked_up_row_bytes(model, formats) if has_embedding else 0
    if has_embedding and shares_table(model, formats):
        return embedding_bytes
    return embedding_bytes + (head_row_bytes(model, formats) if has_head else 0)


def shares_table(model: ModelSpec, formats: Formats) -> bool:
    """Whether embedding and head of one stage are one table."""
    return model.tied_embeddings and (formats.as_stored or not formats.packed)


def beside_embedding_bytes(model: ModelSpec, formats: Formats) -> int:
    """Of the first stage's members, as rows of the table that is looked up in."""
    if formats.as_stored:
        return model.stored.beside_embedding_bytes if model.stored else 0
    return -(-model.beside_embedding * _looked_up_row_bytes(model, formats) // model.hidden_size)


def outside_bytes(model: ModelSpec, formats: Formats) -> int:
    """Of what is neither in a layer nor in a vocabulary table: the final norm."""
    if formats.as_stored:
        return model.stored.outside_bytes if model.stored else 0
    return model.hidden_size * formats.activation_bytes


def weight_formats(model: ModelSpec) -> dict[str, float]:
    """Bits of a parameter by weight format, widest first: those of every model, and its own files'."""
    if model.stored is None:
        return WEIGHT_BITS
    bits = WEIGHT_BITS | {model.stored.format: 8 * stored_bytes(model) / model.num_parameters}
    return dict(sorted(bits.items(), key=lambda one: -one[1]))


def stored_bytes(model: ModelSpec) -> int:
    """Of all weights in the model's own files; 0 where these are not quantised."""
    if model.stored is None:
        return 0
    layers = sum(
        model.kv_heads * layer.per_kv_head.stored_bytes
        + model.ffn_columns * layer.per_ffn_column.stored_bytes
        + layer.replicated.stored_bytes
        for layer in model.layers
    )
    head_row = 0 if model.tied_embeddings else model.stored.head_row_bytes
    tables = model.vocab_rows * (model.stored.embedding_row_bytes + head_row)
    return layers + tables + model.stored.beside_embedding_bytes + model.stored.outside_bytes


def widest_first(model: ModelSpec, names: Iterable[str]) -> tuple[str, ...]:
    """Those that are formats of the model's weights."""
    asked = set(names)
    return tuple(name for name in weight_formats(model) if name in asked)
